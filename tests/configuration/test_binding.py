"""Binding recipe options to signatures, and building objects from them."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from configuration.binding import bind, bind_all, fits
from configuration.targets import build, import_target


@dataclass
class Part:
    size: int
    rate: float = 0.1
    mode: Literal["a", "b"] = "a"
    where: str | Path | None = None
    lengths: list[int] | None = None


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (1.5, int, False),
        (1, bool, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (None, int | None, True),
        (None, int, False),
        ([1, 2], list[int], True),
        ([1, "x"], list[int], False),
        (3, list[int] | None, False),
        ("x", str | Path, True),
        ({"a": 1}, dict[str, Any], True),
        (3, Any, True),
        ([0.9, 0.95], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ([0.9, "x"], tuple[float, float], False),
        ([1, 2, 3], tuple[int, ...], True),
    ],
)
def test_fits(value, annotation, expected):
    assert fits(value, annotation) is expected


def test_bind_reports_unknown_missing_and_wrong_types_together():
    problems = bind(Part, {"sise": 3, "rate": "fast", "mode": "c", "lengths": [1, "x"]}, "part")
    assert problems == [
        "unknown option 'part.sise' (did you mean 'size'?)",
        "part.rate must be float, got 'fast'",
        "part.mode must be one of a, b, got 'c'",
        "part.lengths must be list[int] or null, got [1, 'x']",
        "part.size is required: pass part.size=VALUE",
    ]
    assert bind(Part, {"size": 1, "lengths": None}, "part") == []
    assert bind(Part, {}, "part", partial=True) == []


def test_model_configurations_take_no_unknown_option():
    node = {"config": {"_target_": "models.drt.DRTConfig", "hidden_sise": 3}}
    assert bind_all(node, "model") == ["unknown option 'model.config.hidden_sise' (did you mean 'hidden_size'?)"]


def test_only_listed_packages_and_existing_names_are_targets():
    with pytest.raises(ValueError, match="outside the packages"):
        import_target("os.system")
    with pytest.raises(ValueError, match="does not exist"):
        import_target("torch.nn.Linnear")
    with pytest.raises(ValueError, match="does not exist"):
        import_target("callbacks.nothing.Here")
    assert import_target("torch.nn.Linear") is torch.nn.Linear


def test_build_nests_targets_and_partials():
    built = build({"layers": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}], "n": 1})
    assert isinstance(built["layers"][0], torch.nn.Linear) and built["n"] == 1
    made = build({"_target_": "torch.nn.Linear", "_partial_": True, "in_features": 2})
    assert isinstance(made, functools.partial) and made(out_features=5).weight.shape == (5, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"_target_": "torch.nn.Linear", "in_features": "x", "out_features": 1}, "a.b: "),
        ({"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "devices": -3}, "a.b: `devices` selected"),
        ({"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "max_time": "x"}, "a.b: `Timer"),
        ({"_target_": "lightning.pytorch.loggers.WandbLogger"}, "a.b: .*pip install"),
    ],
)
def test_whatever_a_constructor_raises_names_the_section(options, sentence, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=sentence):
        build({"b": options}, "a")


def test_a_missing_file_and_an_error_of_a_function_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        build({"_target_": "configuration.export.CheckpointExport", "checkpoint": str(tmp_path / "x")}, "a")
    with pytest.raises(TypeError, match="zeros"):
        build({"_target_": "torch.zeros", "nothing": 1}, "a")
