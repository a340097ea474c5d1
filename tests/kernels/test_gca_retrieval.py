import pytest
import torch

from kernels.gca import chunk_weights, retrieve_chunks, selection
from kernels.gca.selection import BLOCK


def brute_force(total, hidden, top_k):
    """Sort (score, lower chunk) in plain Python."""
    result = torch.full((*total.shape[:2], top_k), -1, dtype=torch.int32)
    for b in range(total.shape[0]):
        for n in range(total.shape[1]):
            seen = [e for e in range(total.shape[2]) if not hidden[b, n, e]]
            best = sorted(seen, key=lambda e: (-total[b, n, e].item(), e))[:top_k]
            result[b, n, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return result


@pytest.mark.parametrize("name", ["retrieval_causal", "retrieval_ranges"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fixtures(load, name, autocast):
    t, meta = load(name)
    queries, landmarks = t["queries"].requires_grad_(), t["landmarks"].requires_grad_()
    options = {"visible": t.get("visible", "causal"), "noise": t.get("noise")}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        indices, scores = retrieve_chunks(queries, landmarks, meta["top_k"], **options)
        weights = chunk_weights(scores)
    assert indices.dtype == torch.int32 and torch.equal(indices, t["indices"])
    assert torch.equal(scores == -torch.inf, indices < 0)
    torch.testing.assert_close(scores, t["scores"], atol=2e-6, rtol=0)
    torch.testing.assert_close(weights, t["weights"], atol=2e-6, rtol=0)
    weights.backward(t["grad_weights_in"])
    torch.testing.assert_close(queries.grad, t["grad_queries"], atol=5e-6, rtol=0)
    torch.testing.assert_close(landmarks.grad, t["grad_landmarks"], atol=5e-6, rtol=0)


def test_ties_go_to_the_lower_chunk():
    indices, scores = retrieve_chunks(torch.zeros(1, 5, 4), torch.randn(1, 5, 4), 3)
    assert indices[0].tolist() == [[-1] * 3, [0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 2]]
    assert torch.equal(scores[0, 3], torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 16])  # powers of 4: the scale keeps ties exact
def test_many_ties_over_many_columns(dtype, width):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (2, 6, width), generator=generator).to(dtype)
    landmarks = torch.randint(-2, 3, (2, 700, width), generator=generator).to(dtype)
    indices, _ = retrieve_chunks(queries, landmarks, 4)
    total = (queries @ landmarks.mT) * width**-0.5
    hidden = torch.arange(700) >= torch.arange(694, 700)[:, None]
    assert torch.equal(indices, brute_force(total, hidden.expand(2, -1, -1), 4))


def test_row_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    queries, landmarks = (torch.randn(2, 40, 8, generator=generator) for _ in range(2))
    upstream = torch.randn(2, 40, 4, generator=generator)

    def run():
        leaves = queries.clone().requires_grad_(), landmarks.clone().requires_grad_()
        indices, scores = retrieve_chunks(*leaves, 4)
        chunk_weights(scores).backward(upstream)
        return indices, scores.detach(), leaves[0].grad, leaves[1].grad

    expected = run()
    monkeypatch.setattr("kernels.gca.retrieval.BLOCK", 300)
    monkeypatch.setitem(BLOCK, "cpu", 300)
    for result, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(result, wanted, atol=2e-6, rtol=0)


def test_gradients_match_the_dense_formula():
    generator = torch.Generator().manual_seed(2)
    q, keys = (torch.randn(1, 9, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    indices, scores = retrieve_chunks(q, keys, 3)
    assert torch.autograd.gradcheck(lambda a, b: chunk_weights(retrieve_chunks(a, b, 3)[1]), (q, keys))
    dense = (q @ keys.mT / 5**0.5).gather(-1, indices.long().clamp(min=0)).masked_fill(indices < 0, -torch.inf)
    torch.testing.assert_close(scores, dense)
    assert scores.dtype == torch.float64


def test_visibility_forms():
    generator = torch.Generator().manual_seed(3)
    queries, landmarks = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 8, 4, generator=generator)
    causal = retrieve_chunks(queries, landmarks, 10)
    ranges = torch.tensor([[[0, 5], [0, 6], [0, 7]]])
    mask = torch.arange(8) < torch.tensor([5, 6, 7])[:, None]
    for visible in (ranges, ranges.expand(2, -1, -1), mask[None], mask.expand(2, -1, -1)):
        for result, wanted in zip(retrieve_chunks(queries, landmarks, 10, visible=visible), causal, strict=True):
            assert torch.equal(result, wanted)
    assert (causal[0] >= 0).sum(-1).tolist() == [[5, 6, 7]] * 2  # more slots than chunks: the rest is empty


def test_rows_that_see_nothing_are_empty_and_harmless():
    queries, landmarks = torch.randn(1, 2, 4).requires_grad_(), torch.randn(1, 2, 4).requires_grad_()
    indices, scores = retrieve_chunks(queries, landmarks, 2)
    weights = chunk_weights(scores)
    assert indices.tolist() == [[[-1, -1], [0, -1]]] and weights.tolist() == [[[0.0, 0.0], [1.0, 0.0]]]
    weights.square().sum().backward()
    assert torch.isfinite(queries.grad).all() and not queries.grad[0, 0].any() and not landmarks.grad[0, 1].any()
    plain = torch.full((3, 2), -torch.inf, requires_grad=True)
    chunk_weights(plain).sum().backward()
    assert torch.equal(plain.grad, torch.zeros(3, 2))


def test_unseen_landmarks_may_hold_nan():
    queries, landmarks = torch.randn(1, 4, 4).requires_grad_(), torch.randn(1, 4, 4)
    landmarks[0, 3] = torch.nan
    landmarks.requires_grad_()
    _, scores = retrieve_chunks(queries, landmarks, 2)
    chunk_weights(scores).square().sum().backward()
    assert torch.isfinite(queries.grad).all() and torch.isfinite(landmarks.grad).all()


def test_noise_selects_but_does_not_score():
    queries, landmarks = torch.zeros(1, 1, 4), torch.zeros(1, 4, 4)
    noise = torch.tensor([[[0.0, 1.0, 2.0, 9.0]]])
    indices, scores = retrieve_chunks(queries, landmarks, 2, noise=noise)
    assert indices.tolist() == [[[2, 1]]] and scores.tolist() == [[[0.0, 0.0]]]


def test_gumbel_choices_follow_the_softmax():
    """One of three chunks under Gumbel noise is a draw from the softmax: chi-square at 0.1 %, 20,000 draws."""
    draws, scores = 20_000, torch.tensor([0.0, 1.0, -0.5])
    queries = torch.ones(1, draws, 1)
    landmarks = scores.view(1, 3, 1)
    everything = torch.ones(1, draws, 3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(4)
    options = {"visible": everything, "noise": "gumbel"}
    indices, returned = retrieve_chunks(queries, landmarks, 2, generator=generator, **options)
    p = torch.softmax(scores, 0)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    expected = torch.tensor([draws * p[a] * p[b] / (1 - p[a]) for a, b in pairs])
    observed = torch.tensor([((indices[0, :, 0] == a) & (indices[0, :, 1] == b)).sum() for a, b in pairs])
    assert ((observed - expected).square() / expected).sum() < 20.515  # 5 degrees of freedom
    torch.testing.assert_close(returned, scores[indices.long()])
    again = retrieve_chunks(queries, landmarks, 2, generator=generator.manual_seed(4), **options)[0]
    other = retrieve_chunks(queries, landmarks, 2, generator=generator, **options)[0]
    assert torch.equal(indices, again) and not torch.equal(indices, other)


def test_precision_setting_is_neither_used_nor_changed():
    generator = torch.Generator().manual_seed(5)
    queries, landmarks = (torch.randn(1, 64, 256, generator=generator) for _ in range(2))
    expected = retrieve_chunks(queries, landmarks, 4)[1]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        scores = retrieve_chunks(queries, landmarks, 4)[1]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("own", ["none", "tf32", "ieee"])
def test_an_inherited_precision_stays_inherited(own):
    backend = torch.backends.mkldnn.matmul
    values, before = torch.ones(1, 4, 8), (torch.backends.fp32_precision, backend.fp32_precision)
    try:
        torch.backends.fp32_precision, backend.fp32_precision = "bf16", own
        retrieve_chunks(values, values, 2)
        assert backend.fp32_precision == ("bf16" if own == "none" else own)
        torch.backends.fp32_precision = "ieee"
        assert backend.fp32_precision == ("ieee" if own == "none" else own)
    finally:
        torch.backends.fp32_precision, backend.fp32_precision = before


@pytest.mark.parametrize("block", [32, 2**20])
@pytest.mark.parametrize("form", ["causal", "ranges", "mask", "noise"])
def test_decoding_over_many_landmarks_in_blocks(monkeypatch, block, form):
    """A few rows over a long store in bfloat16: blocks of columns, converted one at a time; ties across blocks."""
    generator = torch.Generator().manual_seed(7)
    queries = torch.randint(-2, 3, (2, 2, 16), generator=generator).float()
    landmarks = torch.randint(-2, 3, (2, 1000, 16), generator=generator).bfloat16()
    visible = {
        "causal": "causal",
        "ranges": torch.tensor([[[3, 777], [500, 500]], [[0, 1000], [990, 993]]]),
        "mask": torch.rand(2, 2, 1000, generator=generator) < 0.4,
        "noise": "causal",
    }[form]
    noise = torch.randint(-9, 9, (2, 2, 1000), generator=generator).float() if form == "noise" else None
    monkeypatch.setitem(BLOCK, "cpu", block)
    monkeypatch.setattr("kernels.gca.selection.CONVERTED", 40 * block)
    indices, scores = retrieve_chunks(queries, landmarks, 5, visible=visible, noise=noise)
    dense = queries @ landmarks.float().mT / 4
    column = torch.arange(1000)
    if isinstance(visible, str):
        hidden = (column >= torch.arange(998, 1000)[:, None]).expand(2, -1, -1)
    elif visible.dtype == torch.bool:
        hidden = ~visible
    else:
        hidden = (column < visible[..., :1]) | (column >= visible[..., 1:])
    wanted = brute_force(dense if noise is None else dense + noise, hidden, 5)
    assert torch.equal(indices, wanted)
    found = dense.gather(-1, wanted.long().clamp(min=0)).masked_fill(wanted < 0, -torch.inf)
    assert torch.equal(scores, found)


def test_onednn_product_is_that_of_the_default():
    query, keys = torch.randn(2, 40, 96), torch.randn(2, 70, 96)
    exact = query.double() @ keys.double().mT
    assert (selection._product(query, keys).double() - exact).abs().max() < 2e-5
    assert selection._onednn_is_better() in (True, False)


@pytest.mark.parametrize("options", [
    {"top_k": 0}, {"visible": "all"}, {"visible": torch.zeros(1, 4, 3)}, {"visible": torch.zeros(3, 4, 2).long()},
    {"noise": "normal"}, {"noise": torch.zeros(1, 4, 4)},
])  # fmt: skip
def test_wrong_arguments_are_refused(options):
    with pytest.raises(ValueError):
        retrieve_chunks(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), **({"top_k": 2} | options))
    with pytest.raises(ValueError, match="at least as many"):
        retrieve_chunks(torch.zeros(1, 4, 3), torch.zeros(1, 3, 3), 2)
