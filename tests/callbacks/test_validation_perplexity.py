"""Means over the validation, their names, and what is kept."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.validation_perplexity import ValidationPerplexity


def test_training_is_unchanged(assert_changes_nothing):
    assert_changes_nothing(ValidationPerplexity())


def test_means_equal_plain_sums(fit):
    callback = ValidationPerplexity()
    trainer, module = fit(callback, max_steps=5)
    for index, (length, suffix) in enumerate([(16, ""), (8, "_at_8")]):
        nll = torch.cat([nll for loader, nll, _ in module.scores if loader == index]).double()
        result = callback.last_result["lengths"][str(length)]
        assert result["num_targets"] == nll.numel() == 3 * 2 * length
        assert result["nll_sum"] == pytest.approx(float(nll.sum()), rel=1e-12)
        metrics = trainer.callback_metrics
        assert float(metrics[f"val/loss{suffix}"]) == pytest.approx(float(nll.mean()))
        assert float(metrics[f"val/perplexity{suffix}"]) == pytest.approx(math.exp(nll.mean()))
        assert float(metrics[f"val/bits_per_byte{suffix}"]) == pytest.approx(float(nll.mean()) / math.log(2) / 3)
        for j, total in enumerate(result["position_nll_sum"]):
            begin, end = result["position_edges"][j : j + 2]
            assert total == pytest.approx(float(nll[:, begin:end].sum()))
    assert callback.last_result["step"] == 5


def test_uncounted_targets_leave_sum_and_count(fit, lab):
    class Masked(lab["Module"]):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            scores = super().validation_step(batch, batch_idx, dataloader_idx)
            scores["counted"][:, ::2] = False
            scores["nll"] = scores["nll"] * scores["counted"]
            return scores

    callback = ValidationPerplexity()
    _, module = fit(callback, module=Masked(lab["tiny_llama"]()), max_steps=5)
    nll = torch.cat([nll[:, 1::2] for loader, nll, _ in module.scores if loader == 0]).double()
    result = callback.last_result["lengths"]["16"]
    assert result["num_targets"] == nll.numel()
    assert result["loss"] == pytest.approx(float(nll.mean()))


def test_checkpoints_can_monitor_and_keep_the_result(fit, tmp_path):
    callback = ValidationPerplexity()
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_top_k=1)
    fit(callback, best, enable_checkpointing=True, max_steps=5)
    assert float(best.best_model_score) == pytest.approx(callback.last_result["lengths"]["16"]["loss"])
    states = torch.load(best.best_model_path, weights_only=True)["callbacks"]
    other = ValidationPerplexity()
    other.load_state_dict(states["ValidationPerplexity"])
    assert other.last_result == callback.last_result


def test_sanity_check_leaves_nothing(fit):
    callback = ValidationPerplexity()
    trainer, _ = fit(callback, num_sanity_val_steps=2, val_check_interval=40)
    assert callback.last_result is None
    assert "val/loss" not in trainer.callback_metrics


def test_ranks_are_added_before_the_exponential(fit, monkeypatch):
    callback = ValidationPerplexity()
    seen = []

    def two_ranks(self, tensor, *_, reduce_op=None, **__):
        if tensor.shape[:1] != (2,):
            return tensor  # one of Lightning's own
        seen.append((reduce_op, tensor.dtype))
        return tensor * 2

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce", two_ranks)
    fit(callback, max_steps=5)
    result = callback.last_result["lengths"]["16"]
    assert seen == [("sum", torch.float64)] * 2
    assert result["num_targets"] == 2 * 3 * 2 * 16
    assert result["perplexity"] == pytest.approx(math.exp(result["nll_sum"] / result["num_targets"]))


def test_validation_alone_without_a_datamodule(make_trainer, lab):
    callback, module, data = ValidationPerplexity(), lab["Module"](lab["tiny_llama"]()), lab["Data"]()
    (metrics, _) = make_trainer(callback).validate(module, dataloaders=data.val_dataloader(), verbose=False)
    assert sorted(callback.last_result["lengths"]) == ["16", "8"]
    assert callback.last_result["lengths"]["16"]["bits_per_byte"] is None
    assert metrics["val/loss"] == pytest.approx(callback.last_result["lengths"]["16"]["loss"])


def test_other_validation_outputs_are_refused(fit, lab):
    class Silent(lab["Module"]):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    with pytest.raises(ValueError, match="validation_step must return"):
        fit(ValidationPerplexity(), module=Silent(lab["tiny_llama"]()))
