"""The gradient of a step does not depend on how its sequences are split; bad steps and bad counts are caught."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from weighted_step import make, run, sequences, tiny_llama

from lightning_modules.deepspeed_precision import GradientsScaledOnce
from losses.base_scoring import score_base_nll
from losses.token_weights import TokenWeighting

SCRIPT = Path(__file__).with_name("weighted_step.py")


@pytest.fixture(scope="module")
def dense():
    """Gradient of sum(w L) / N from logits and cross entropy."""
    model, rows = tiny_llama(), sequences()
    ids, valid = rows["input_ids"], rows["valid"]
    base = score_base_nll(model, ids, base_length=8, base_stride=6, valid=valid)
    logits = model(ids).logits[:, :-1].transpose(1, 2)
    nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
    weights = TokenWeighting.preset("dense").weights(nll.detach(), base, valid)
    ((weights * nll)[valid].sum() / valid.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, want):
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        assert (found[name] - gradient).norm() <= 2e-4 * gradient.norm(), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_of_a_step(dense, accumulate):
    gradients, trainer, _ = run(accumulate=accumulate)
    assert_same(gradients.found, dense)
    logged = trainer.callback_metrics
    assert logged["train/weight_mean"].item() == pytest.approx(1, abs=1e-5)
    assert 0 < logged["train/weight_effective_share"] < 1
    assert logged["train/unscored_share"].item() == pytest.approx(14 / 61)
    assert {"train/ce", "train/ce_0_8", "train/ce_8_40", "train/long_short_gap"} <= logged.keys()


def test_gradient_of_two_processes(dense, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_same(found["gradients"], dense)
    alone = run()[1].callback_metrics
    for name in ("train/ce", "train/ce_8_40", "train/weight_std", "train/weight_max", "train/long_short_gap"):
        assert found["logged"][name].item() == pytest.approx(alone[name].item(), rel=1e-5), name


def test_wrong_or_missing_number_of_targets_is_refused():
    def wrong(batch):
        batch["num_step_targets"] = batch["num_step_targets"] + 1

    with pytest.raises(ValueError, match="num_step_targets announced 62"):
        run(change=wrong)
    with pytest.raises(ValueError, match="no num_step_targets"):
        run(accumulate=2, change=lambda batch: batch.pop("num_step_targets"))
    run(change=lambda batch: batch.pop("num_step_targets"))


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    module = make()
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    whole = module.loss

    def broken(batch):
        loss_sum, num_targets, sums = whole(batch)
        return loss_sum * float("nan"), num_targets, sums

    module.loss = broken
    _, trainer, module = run(module=module)
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    after = dict(module.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="3 steps in a row"):
        module.skipping.max_in_row = 3
        run(module=module, max_steps=9)


def test_scores_keep_their_bits_under_low_precision(monkeypatch):
    seen = []
    original = TokenWeighting.weights

    def spy(self, long_nll, base_nll, *rest, **options):
        seen.append((long_nll, base_nll))
        return original(self, long_nll, base_nll, *rest, **options)

    monkeypatch.setattr(TokenWeighting, "weights", spy)
    scores = torch.rand(2, 39, generator=torch.Generator().manual_seed(3)) * 5

    def add(batch):
        batch["base_nll_bits"] = scores.view(torch.int32)

    for options in ({"precision": "bf16-true"}, {"plugins": [MixedPrecision("bf16-mixed", "cpu")]}):
        seen.clear()
        run(module=make(scorer="frozen"), change=add, **options)
        long_nll, base_nll = seen[0]
        assert torch.equal(base_nll, scores)
        assert long_nll.dtype == torch.float32
        valid = sequences()["valid"]
        assert not torch.equal(long_nll[valid], long_nll[valid].bfloat16().float())


def test_two_runs_end_in_the_same_bits():
    one, two = (run(module=make(), max_steps=3)[2].model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_deepspeed_engine_is_told_not_to_divide():
    class Engine:
        accumulation = 4

        def backward(self, loss, scale_wrt_gas=True):
            self.used = loss / self.accumulation if scale_wrt_gas else loss

    class Module(pl.LightningModule):
        trainer = SimpleNamespace(model=Engine())

    module = Module()
    # Lightning has divided the returned loss of 8 by the accumulation of 4 once.
    GradientsScaledOnce("bf16-mixed").backward(torch.tensor(8.0) / 4, module, None)
    assert module.trainer.model.used.item() == 2.0
