"""The measure the callbacks are held to must itself notice a callback that disturbs training."""

import lightning.pytorch as pl
import pytest
import torch


class Draws(pl.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        torch.rand(1)


class Nudges(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        next(pl_module.parameters()).grad[0, 0] += 1e-3


@pytest.mark.parametrize("intruder", [Draws, Nudges])
def test_intruders_are_noticed(assert_changes_nothing, intruder):
    with pytest.raises(AssertionError):
        assert_changes_nothing(intruder())
