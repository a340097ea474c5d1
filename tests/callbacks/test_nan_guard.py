"""A loss that is not a number never reaches the weights."""

import copy

import pytest
import torch

from callbacks.nan_guard import NaNGuard, NonFiniteLossError


def test_training_is_unchanged(assert_changes_nothing):
    assert_changes_nothing(NaNGuard())


@pytest.mark.parametrize(("accumulate", "poisoned_batch"), [(1, 3), (2, 6), (2, 7)])
def test_stops_before_the_step_with_a_saved_state(fit, lab, tmp_path, accumulate, poisoned_batch):
    _, healthy = fit(NaNGuard(), max_steps=3, accumulate_grad_batches=accumulate, val_check_interval=40)
    weights = copy.deepcopy(healthy.state_dict())
    broken = lab["Module"](lab["tiny_llama"](), poison_step=poisoned_batch)
    with pytest.raises(NonFiniteLossError) as error:
        fit(NaNGuard(), module=broken, accumulate_grad_batches=accumulate, val_check_interval=40)
    sentence = str(error.value)
    assert "in step 4 (nan)" in sentence
    assert f"sample indices {2 * poisoned_batch}, {2 * poisoned_batch + 1};" in sentence
    saved = torch.load(tmp_path / "nan_step_3.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    # The step is taken again from its first micro-batch.
    taken = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert {taken[name] for name in ("ready", "started", "processed", "completed")} == {3 * accumulate}
    for name, tensor in weights.items():
        assert torch.equal(broken.state_dict()[name], tensor), name
        assert torch.equal(saved["state_dict"][name], tensor), name


def test_without_the_guard_the_weights_are_lost(fit, lab):
    _, module = fit(module=lab["Module"](lab["tiny_llama"](), poison_step=3))
    assert bool(torch.isnan(module.model.lm_head.weight).any())


def test_resuming_does_not_look_at_the_file(fit, lab, tmp_path):
    from callbacks.checkpoint import newest_checkpoint

    with pytest.raises(NonFiniteLossError):
        fit(NaNGuard(output=str(tmp_path / "run")), module=lab["Module"](lab["tiny_llama"](), poison_step=0))
    assert (tmp_path / "run" / "nan_step_0.ckpt").is_file()
    assert newest_checkpoint(tmp_path / "run") is None


def test_every_rank_stops_when_another_one_saw_it(fit, monkeypatch):
    monkeypatch.setattr(
        "lightning.pytorch.strategies.SingleDeviceStrategy.reduce", lambda self, tensor, *_, **__: tensor + 1
    )
    with pytest.raises(NonFiniteLossError, match="on another rank"):
        fit(NaNGuard())


def test_an_infinite_gradient_of_a_finite_loss_stops_too(fit, lab, tmp_path):
    module = lab["Module"](lab["tiny_llama"]())
    weight = module.model.lm_head.weight
    before = weight.detach().clone()
    weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    with pytest.raises(NonFiniteLossError, match=r"the gradient is not finite in step 1 .*, sample indices 0, 1;"):
        fit(NaNGuard(), module=module, gradient_clip_val=1.0)
    assert torch.equal(weight, before)
    assert torch.equal(torch.load(tmp_path / "nan_step_0.ckpt")["state_dict"]["model.lm_head.weight"], before)
