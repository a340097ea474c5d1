"""The blockwise cross entropy of logits against PyTorch's, in values, gradients, memory and refusals."""

import pytest
import torch

from kernels import cross_entropy
from kernels.cross_entropy import logit_nll
from kernels.cross_entropy.reference import logit_nll_reference


def case(rows, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[:: rows // 3 + 1] = -100
    return logits, targets, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("block", [1, 30, 2**18])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (7, 11), (65, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients_equal_the_reference(block, rows, vocabulary, dtype, monkeypatch):
    monkeypatch.setitem(cross_entropy.BLOCK, "cpu", block)
    logits, targets, upstream = case(rows, vocabulary, dtype)
    results = []
    for function in (logit_nll, logit_nll_reference):
        leaf = logits.clone().requires_grad_()
        nll = function(leaf, targets)
        nll.backward(upstream.to(nll.dtype))
        results.append((nll.detach(), leaf.grad))
    (nll, grad), (expected, expected_grad) = results
    assert (nll.dtype, grad.dtype) == (expected.dtype, expected_grad.dtype)
    torch.testing.assert_close(nll, expected, atol=1e-6, rtol=1e-6)
    ulp = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=ulp)


def test_gradients_against_finite_differences():
    logits, targets, _ = case(3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: logit_nll(x, targets), logits.requires_grad_())


def test_ignored_rows_have_no_influence_whatever_they_hold():
    logits, targets, upstream = case(9, 11)
    ignored = targets == -100
    poisoned = logits.masked_fill(ignored[:, None], float("nan")).requires_grad_()
    nll = logit_nll(poisoned, targets)
    nll.backward(upstream)
    assert ignored.any() and bool((nll[ignored] == 0).all()) and bool((poisoned.grad[ignored] == 0).all())
    assert torch.equal(nll.detach(), logit_nll(logits, targets)) and bool(poisoned.grad.isfinite().all())
    other = targets.masked_fill(ignored, 7)
    assert bool((logit_nll(logits, other, ignore_index=7)[other == 7] == 0).all())


def test_expanded_gradients_and_no_rows_at_all():
    logits, targets, _ = case(9, 11)
    leaf, expected = (logits.clone().requires_grad_() for _ in range(2))
    logit_nll(leaf, targets).sum().backward()
    logit_nll(expected, targets).backward(torch.ones(9))
    assert torch.equal(leaf.grad, expected.grad)
    assert logit_nll(logits[:0], targets[:0]).shape == (0,)


def test_autocast_changes_nothing():
    logits, targets, _ = case(9, 300)
    expected = logit_nll(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logit_nll(logits, targets), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_copy_of_the_logits_is_alive(dtype):
    logits = torch.randn(2**11, 2**12, dtype=dtype)
    targets = torch.randint(2**12, (2**11,))
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        logit_nll(logits, targets)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < logits.numel() * 4 / 4


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (2,)])
def test_shapes_that_do_not_fit_are_explained(shape):
    with pytest.raises(ValueError, match="expected logits"):
        logit_nll(torch.zeros(shape), torch.zeros(2, dtype=torch.long))
