"""What training losses are made of, each by itself: skipped steps, sums, the dense teacher, short contexts."""

import pytest
import torch
from compression_cases import SENTINELS, batch, make, randomise_adapters, tiny_model
from torch import nn

from lightning_modules.dense_teacher import DenseTeacher
from lightning_modules.non_finite_steps import NonFiniteSteps
from lightning_modules.short_contexts import ShortContexts
from lightning_modules.weighting_metrics import add_sums


def test_only_steps_in_a_row_end_a_run():
    watched, weight = NonFiniteSteps(max_in_row=2), nn.Parameter(torch.ones(2))
    losses = [float("nan"), 1.0, float("inf"), 1.0]
    for loss in losses:
        weight.grad = torch.ones(2)
        watched.watch(torch.tensor(loss))
        watched.watch(torch.tensor(1.0))
        watched.end_step([weight], torch.tensor(1.0))
        assert (weight.grad is None) == (loss != 1.0)
    assert watched.skipped == 2
    watched.end_step([weight], torch.tensor(float("inf")))
    with pytest.raises(ValueError, match="not finite in 2 steps in a row: lower"):
        watched.end_step([weight], torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="which this engine cannot skip"):
        NonFiniteSteps(max_in_row=9).end_step([weight], torch.tensor(float("nan")), can_skip=False)


def test_sums_of_micro_batches_keep_the_greatest_weight():
    parts = [{"weight_max": torch.tensor(value), "nll": torch.tensor(value)} for value in (2.0, 5.0, 3.0)]
    total = None
    for part in parts:
        total = add_sums(total, part)
    assert total == {"weight_max": torch.tensor(5.0), "nll": torch.tensor(10.0)}


def test_the_teacher_is_the_base_without_dropout():
    module = make(tiny_model(), lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.5})
    for layer in module.model.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.5
    layout = module.rows(batch())[0]
    teacher = DenseTeacher(1.0, 1.0)
    module.train()
    first = teacher.logits(module.model, layout, None)
    randomise_adapters(module)
    assert torch.equal(teacher.logits(module.model, layout, None), first) and not first.requires_grad
    assert all(layer.training for layer in module.modules())
    ids = layout.input_ids.gather(1, layout.plain_index.clamp(min=0))[:1]
    plain = tiny_model()
    plain.resize_token_embeddings(first.shape[-1])
    expected = plain.eval()(ids, use_cache=False).logits
    known = slice(0, min(SENTINELS.ids))
    torch.testing.assert_close(first[:1, :, known], expected[..., known], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bound", "passes"), [(None, 1), (2, 3), (1, 6)])
def test_windows_are_bounded_in_a_pass(bound, passes):
    model, calls = tiny_model(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 19, dtype=torch.bool)
    contexts = ShortContexts(base_length=8, base_stride=4, windows_per_forward=bound)
    found = contexts.nll(model, ids, valid, strategy=None, parity=False)
    assert len(calls) == passes
    whole = ShortContexts(base_length=8, base_stride=4).nll(model, ids, valid, strategy=None, parity=False)
    torch.testing.assert_close(found, whole, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert found.isnan().sum() == 2 * 7
    parity = contexts.nll(model, ids, valid, strategy=None, parity=True)
    assert parity.isnan().sum() == 2 * 8 and torch.equal(parity[:, 8:], found[:, 8:])
