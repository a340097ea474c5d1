"""Result files, identities and tables."""

import json

import pytest

from evaluation.results import csv_text, digest, model_identity, text_table, write_json, write_text


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("evaluation.results.os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}


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
