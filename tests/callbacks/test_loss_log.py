"""The loss of a step is the mean over its targets, of all micro-batches and ranks."""

import pytest
import torch

from callbacks.checkpoint import StepCheckpoint, newest_checkpoint
from callbacks.loss_log import LossLog, read_rows


def uneven(lab):
    """Micro-batch i has i + 1 targets of loss i each; the last of them breaks on demand."""

    class Uneven(lab["Module"]):
        broken_at = None

        def training_step(self, batch, batch_idx):
            if batch_idx == self.broken_at:
                raise RuntimeError("broken")
            count = torch.tensor(batch_idx + 1)
            return super().training_step(batch, batch_idx) | {
                "nll_sum": batch_idx * count.float(),
                "num_targets": count,
            }

    return Uneven(lab["tiny_llama"]())


def fit_logged(fit, lab, path, module=None, **options):
    callback = LossLog(str(path))
    fit(callback, module=module or uneven(lab), accumulate_grad_batches=2, val_check_interval=40, **options)
    return callback


def test_micro_batches_count_by_their_targets(fit, lab, tmp_path):
    fit_logged(fit, lab, tmp_path / "log", max_steps=3, log_every_n_steps=2)
    rows = read_rows(tmp_path / "log")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([2 / 3, (2 * 3 + 3 * 4) / 7, (4 * 5 + 5 * 6) / 11])
    assert [row["tokens"] for row in rows] == [64, 128, 192] and rows[0]["lr"] == 1e-2


def two_ranks(monkeypatch, other):
    strategy = "lightning.pytorch.strategies.SingleDeviceStrategy"
    calls = []

    def reduce(self, tensor, *_, reduce_op=None, **__):
        if tensor.dtype != torch.float64:
            return tensor  # one of Lightning's own
        calls.append((len(tensor), reduce_op))
        return tensor + torch.tensor(other, dtype=torch.float64)

    monkeypatch.setattr(f"{strategy}.reduce", reduce)
    monkeypatch.setattr(f"{strategy}.distributed_sampler_kwargs", {"num_replicas": 2, "rank": 0}, raising=False)
    return calls


def test_ranks_are_added_once_for_each_logging_step(fit, lab, tmp_path, monkeypatch):
    calls = two_ranks(monkeypatch, [10.0, 3.0, 64.0])
    trainer_log = {}

    class Module(type(uneven(lab))):
        def on_train_batch_end(self, *_):
            trainer_log.update(self.trainer.callback_metrics)

    fit_logged(fit, lab, tmp_path / "log", Module(lab["tiny_llama"]()), max_steps=4, log_every_n_steps=2)
    rows = read_rows(tmp_path / "log")
    assert calls == [(2, "sum"), (2, "sum")]
    assert rows[1]["loss"] == pytest.approx((2 * 3 + 3 * 4 + 10) / (7 + 3)) and rows[1]["tokens"] == 2 * 128
    assert float(trainer_log["train/loss"]) == pytest.approx(rows[3]["loss"]) and float(trainer_log["step"]) == 4


def test_after_a_failure_no_rank_waits_for_the_others(fit, lab, tmp_path, monkeypatch):
    calls, module = two_ranks(monkeypatch, [10.0, 3.0, 64.0]), uneven(lab)
    module.broken_at = 6
    with pytest.raises(RuntimeError, match="broken"):
        fit_logged(fit, lab, tmp_path / "log", module, log_every_n_steps=2)
    assert calls == [(2, "sum")]
    assert [row["step"] for row in read_rows(tmp_path / "log")] == [1, 2, 3]


def test_padding_is_left_out(fit, lab, tmp_path):
    class Masked(type(uneven(lab))):
        def training_step(self, batch, batch_idx):
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, 10:] = 0
            counted = {"num_tokens": torch.tensor(7)} if batch_idx == 3 else {}
            return super().training_step(batch, batch_idx) | counted

    fit_logged(fit, lab, tmp_path / "log", Masked(lab["tiny_llama"]()), max_steps=2)
    assert [row["tokens"] for row in read_rows(tmp_path / "log")] == [40, 67]


def test_a_checkpoint_between_two_logging_steps_holds_the_count(fit, lab, tmp_path):
    options = {"enable_checkpointing": True, "log_every_n_steps": 4}
    for max_steps in (3, 5):
        saving = StepCheckpoint(str(tmp_path / "saved"), every_n_train_steps=3)
        callback, newest = LossLog(str(tmp_path / "log")), newest_checkpoint(tmp_path / "saved")
        fit(saving, callback, module=uneven(lab), ckpt_path=newest, max_steps=max_steps, **options)
    assert [row["tokens"] for row in read_rows(tmp_path / "log")] == [32, 64, 96, 128, 160]


def test_a_loss_that_is_not_finite_is_null(fit, lab, tmp_path):
    class Nan(lab["Module"]):
        def training_step(self, batch, batch_idx):
            bad = {"nll_sum": torch.tensor(float("nan")), "num_targets": torch.tensor(2)}
            return super().training_step(batch, batch_idx) | bad

    fit_logged(fit, lab, tmp_path / "log", Nan(lab["tiny_llama"]()), max_steps=1)
    assert read_rows(tmp_path / "log")[0]["loss"] is None


def test_training_is_unchanged(fit, lab, tmp_path):
    class Counting(lab["Module"]):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            return out | {"nll_sum": out["loss"].detach(), "num_targets": torch.tensor(1)}

    _, plain = fit(module=Counting(lab["tiny_llama"]()))
    _, watched = fit(LossLog(str(tmp_path / "log")), module=Counting(lab["tiny_llama"]()))
    for (name, a), b in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b), name
