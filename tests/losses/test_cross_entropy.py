"""next_token_nll against a per-position version written with plain log-softmax."""

import pytest
import torch

from losses.cross_entropy import next_token_nll


def naive(logits, labels, next_token=None, document_ids=None):
    batch, length, _ = logits.shape
    nll, counted = [], torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch):
        for t in range(length):
            inside = t + 1 < length
            target = int(labels[b, t + 1]) if inside else (-100 if next_token is None else int(next_token[b]))
            if inside and document_ids is not None and document_ids[b, t + 1] != document_ids[b, t]:
                target = -100
            counted[b, t] = target != -100
            nll.append(logits[b, t].sum() * 0 if target == -100 else -logits[b, t].log_softmax(-1)[target])
    return torch.stack(nll).view(batch, length), counted


def case(seed=0, batch=2, length=7, vocab=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocab, generator=generator) * 3
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[0, length // 2] = -100
    return logits, labels, torch.tensor([4, -100])


@pytest.mark.parametrize("with_next", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
def test_values_and_gradients_equal_the_naive_version(with_next, with_documents):
    logits, labels, next_token = case()
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 2], [5, 5, 6, 6, 6, 6, 6]]) if with_documents else None
    last = next_token if with_next else None
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    nll, counted = next_token_nll(ours, labels, next_token=last, document_ids=documents)
    expected, expected_counted = naive(theirs, labels, last, documents)
    assert torch.equal(counted, expected_counted)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(nll.shape, generator=torch.Generator().manual_seed(1))
    (nll * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_gradient_equals_finite_differences():
    logits, labels, next_token = case(length=3, vocab=5)
    logits, labels = logits.double().requires_grad_(), labels.clamp(max=4)
    next_token_nll(logits, labels, next_token=next_token)[0].sum().backward()
    step, flat = 1e-6, logits.detach().flatten()
    for i in range(flat.numel()):
        high, low = flat.clone(), flat.clone()
        high[i] += step
        low[i] -= step
        # The naive float64 sum is used: the returned float32 values are too coarse for differences.
        change = naive(high.view_as(logits), labels, next_token)[0] - naive(low.view_as(logits), labels, next_token)[0]
        assert float(change.sum() / (2 * step)) == pytest.approx(float(logits.grad.flatten()[i]), abs=1e-7)


def test_uncounted_positions_have_no_influence_whatever_they_hold():
    logits, labels, next_token = case()
    _, counted = next_token_nll(logits, labels, next_token=next_token)
    clean = logits.clone().requires_grad_()
    poisoned = logits.masked_fill(~counted[..., None], float("nan")).requires_grad_()
    for tensor in (clean, poisoned):
        nll, _ = next_token_nll(tensor, labels, next_token=next_token)
        assert bool((nll[~counted] == 0).all())
        nll.sum().backward()
    assert torch.equal(clean.grad, poisoned.grad)
    assert bool((poisoned.grad[~counted] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(dtype):
    logits, labels, next_token = case(vocab=300)
    logits = logits.to(dtype).requires_grad_()
    nll, _ = next_token_nll(logits, labels, next_token=next_token)
    expected, _ = next_token_nll(logits.detach().float(), labels, next_token=next_token)
    assert nll.dtype == torch.float32
    assert torch.equal(nll, expected)
    nll.sum().backward()
    assert logits.grad.dtype == dtype


def test_autocast_changes_nothing():
    logits, labels, next_token = case(vocab=300)
    expected = next_token_nll(logits, labels, next_token=next_token)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = logits.clone().requires_grad_()
        nll, _ = next_token_nll(leaf, labels, next_token=next_token)
        nll.sum().backward()
    assert torch.equal(nll, expected)
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a | {"labels": a["labels"][:, 1:]}, "logits must be"),
        (lambda a: a | {"next_token": torch.zeros(3, dtype=torch.long)}, "next_token must be"),
        (lambda a: a | {"document_ids": torch.zeros(2, 3, dtype=torch.long)}, "document_ids must be"),
        (lambda a: a | {"labels": a["labels"] + 11}, "share one vocabulary"),
    ],
)
def test_bad_arguments_are_explained(change, sentence):
    logits, labels, _ = case()
    arguments = change({"logits": logits, "labels": labels})
    with pytest.raises(ValueError, match=sentence):
        next_token_nll(arguments.pop("logits"), arguments.pop("labels"), **arguments)
