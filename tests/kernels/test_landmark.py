"""Landmark attention against published probabilities and a row-by-row definition."""

import pytest
import torch

import kernels.landmark.tiled as tiled
from kernels.landmark import landmark_attention, landmark_grouped_softmax
from kernels.landmark.reference import landmark_attention_reference, landmark_softmax_row


def test_published_probabilities(load):
    tensors, meta = load("landmark_softmax")
    scores = tensors["scores"].clone().requires_grad_()
    probs = landmark_grouped_softmax(scores, int(meta["block_size"]))
    probs.backward(tensors["grad_out"])
    torch.testing.assert_close(probs, tensors["probs"], atol=2e-6, rtol=0)
    torch.testing.assert_close(scores.grad, tensors["grad_scores"], atol=5e-6, rtol=0)


@pytest.mark.parametrize(("num_keys", "block_size"), [(12, 3), (23, 5), (9, 2), (4, 7), (1, 2)])
def test_rows_equal_the_definition(num_keys, block_size):
    scores = torch.randn(num_keys, num_keys, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    probs = landmark_grouped_softmax(scores, block_size)
    for row in range(num_keys):
        expected = landmark_softmax_row(scores[row], row, block_size)
        torch.testing.assert_close(probs[row], expected, atol=1e-14, rtol=0)


def test_any_number_of_blocks():
    scores = torch.randn(2, 280, 280, generator=torch.Generator().manual_seed(0)) * 20
    probs = landmark_grouped_softmax(scores, 4)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 280))
    assert (probs[..., 3::4] == 0).all()
    assert (probs.triu(1) == 0).all()
    # A landmark query never sees itself; the first block of the last query's view still has a share.
    assert probs[:, 279, 279].eq(0).all() and probs[:, 279, :3].sum() > 0


@pytest.mark.parametrize("budget", [1, 300, 2**20])
@pytest.mark.parametrize(("heads", "kv_heads", "given"), [(2, 2, False), (4, 2, True), (3, 1, False)])
def test_tiles_equal_the_reference(monkeypatch, budget, heads, kv_heads, given):
    monkeypatch.setitem(tiled.TILE, "cpu", budget)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(2, 9, heads, 4), normal(2, 14, kv_heads, 4), normal(2, 14, kv_heads, 4)
    positions = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [0, 1, 2, 3, 4, 5, 6, 7, 8]]) if given else None
    places = torch.arange(9).expand(2, -1) if positions is None else positions
    upstream, results = normal(2, 9, heads, 4), []
    for reference in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if reference:
            out = landmark_attention_reference(*leaves, 4, positions=places, scale=0.5)
        else:
            out = landmark_attention(*leaves, 4, positions=positions, scale=0.5)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_low_precision_stays_close_and_keeps_its_dtype():
    q, k, v = (torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    exact = landmark_attention(q.double(), k.double(), v.double(), 8)
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = landmark_attention(*low, 8)
        out.sum().backward()
    assert out.dtype == torch.bfloat16 == low[1].grad.dtype
    assert (out.double() - exact).norm() < 0.02 * exact.norm()


def test_later_keys_have_no_say():
    q, k, v = (torch.randn(1, 21, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    before = landmark_attention(q, k, v, 4)
    k, v = k.clone(), v.clone()
    k[:, 13:] += 3
    v[:, 13:] += 3
    after = landmark_attention(q, k, v, 4)
    assert torch.equal(after[:, :13], before[:, :13])
    assert not torch.equal(after[:, 13:15], before[:, 13:15])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 5, 2, 4), {"block_size": 1}, "block_size counts the landmark"),
        ((1, 5, 3, 4), {}, "not a multiple"),
        ((2, 5, 2, 4), {}, "expected q"),
        ((1, 9, 2, 4), {}, "without positions"),
        ((1, 5, 2, 4), {"positions": torch.zeros(1, 4, dtype=torch.long)}, "positions must be"),
    ],
)
def test_refusals(shape, options, message):
    keys = torch.zeros(1, 6, 2, 4)
    with pytest.raises(ValueError, match=message):
        landmark_attention(torch.zeros(shape), keys, keys, **{"block_size": 3, **options})
