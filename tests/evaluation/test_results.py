"""Result files, identities and tables."""

import json
import math

import pytest

from evaluation.results import csv_text, digest, model_identity, read_json, text_table, write_json, write_text


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("evaluation.results.os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}


def test_numbers_that_are_not_finite_are_null_with_their_reason(tmp_path):
    path = tmp_path / "x.json"
    value = {"loss": math.nan, "runs": [{"sums": [1.0, math.inf]}, {"low": -math.inf, "n": 3}], "fine": 0.5}
    write_json(path, value)
    stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    reasons = stored.pop("not_finite")
    assert stored == {"loss": None, "runs": [{"sums": [1.0, None]}, {"low": None, "n": 3}], "fine": 0.5}
    assert reasons[0] == {"place": ["loss"], "value": "nan"}
    assert [entry["value"] for entry in reasons] == ["nan", "inf", "-inf"]
    restored = read_json(path)
    assert math.isnan(restored.pop("loss"))
    assert restored == {name: item for name, item in value.items() if name != "loss"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_damaged_results_are_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json")


def test_digest_ignores_the_order_of_keys_only():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_model_identity_covers_configuration_and_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first = model_identity(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert model_identity(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    second = model_identity(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, model_identity(tmp_path)}) == 3


def test_tables():
    rows = [{"model": "a", "loss": 1.5, "n": 7}, {"model": "longer", "loss": None, "n": 10}]
    assert csv_text(rows, ["model", "loss"]) == "model,loss\na,1.5\nlonger,\n"
    assert text_table(rows, ["model", "loss", "n"]).splitlines() == [
        "model     loss   n",
        "------  ------  --",
        "a       1.5000   7",
        "longer       -  10",
    ]
