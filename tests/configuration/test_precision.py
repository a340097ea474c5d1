"""The precision of a run, stated by its trainer or by a plugin: what is reported, and what weights are drawn in."""

import pytest
import torch

from configuration import export
from configuration.export import restored_module
from configuration.precision import precision_of
from configuration.training import protocol

PLUGINS = [{"_target_": "callbacks.checkpoint.AtomicCheckpointIO"}, {"precision": "bf16-true"}]


@pytest.mark.parametrize(
    ("trainer", "precision"),
    [
        ({}, "32-true"),
        ({"precision": "bf16-mixed", "plugins": PLUGINS[:1]}, "bf16-mixed"),
        ({"precision": None, "plugins": PLUGINS}, "bf16-true"),
        ({"precision": None, "plugins": None}, "32-true"),
    ],
)
def test_a_plugin_states_the_precision_where_the_trainer_does_not(trainer, precision):
    assert precision_of(trainer) == precision


def test_metrics_name_the_precision_of_a_plugin():
    data = type("Data", (), {"validation_protocol": lambda _: {}})()
    assert protocol({"trainer": {"precision": None, "plugins": PLUGINS}}, data)["precision"] == "bf16-true"


def test_weights_are_drawn_again_in_the_precision_of_a_plugin(monkeypatch, tmp_path):
    drawn = []

    class Module:
        def configure_model(self):
            drawn.append(torch.get_default_dtype())

        def on_load_checkpoint(self, loaded):
            pass

        def load_state_dict(self, state):
            pass

    monkeypatch.setattr(export, "read_checkpoint", lambda _: {"state_dict": {}})
    monkeypatch.setattr(export, "build", lambda *_: Module())
    restored_module({"module": {}, "trainer": {"precision": None, "plugins": PLUGINS}}, tmp_path)
    assert drawn == [torch.bfloat16] and torch.get_default_dtype() == torch.float32
