"""Slices of a sequence's rows give what the whole sequence gives: bit by bit forward, and gradients that add up."""

import pytest
import torch

from kernels.gca import chunk_weights, retrieve_chunks
from kernels.gca.noise import row_seeds
from kernels.gca.selection import BLOCK

CUTS = [(0, 1), (1, 8), (8, 47), (47, 48), (48, 150), (150, 183)]
ROWS, CHUNKS = 183, 190
SEEDS = row_seeds(3, torch.tensor([5, 2]))


@pytest.fixture
def sequence():
    def make(dtype=torch.float32, store=None, chunks=CHUNKS):
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(2, ROWS, 24, generator=generator, dtype=dtype)
        landmarks = torch.randn(2, chunks, 24, generator=generator, dtype=dtype).to(store or dtype)
        return queries, landmarks, torch.randn(2, ROWS, 4, generator=generator, dtype=dtype)

    return make


def retrieve(queries, landmarks, rows=(0, ROWS), **options):
    """Retrieve for some rows; what is given for each row is cut alike."""
    part = slice(*rows)
    options = {name: x[:, part] if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return retrieve_chunks(queries[:, part], landmarks, 4, generator=SEEDS, first_row=rows[0], **options)


def forms():
    """Every form of `visible` and `noise`."""
    generator = torch.Generator().manual_seed(1)
    ranges = torch.arange(ROWS)[None, :, None] + torch.tensor([-20, 5])
    mask = torch.rand(2, ROWS, CHUNKS, generator=generator) < 0.3
    return {
        "causal": {},
        "gumbel": {"noise": "gumbel"},
        "tensor noise": {"noise": torch.randn(2, ROWS, CHUNKS, generator=generator)},
        "ranges": {"visible": ranges.clamp(0, CHUNKS), "noise": "gumbel"},
        "mask": {"visible": mask, "noise": "gumbel"},
    }


@pytest.mark.parametrize("block", [32 * 256, 2**20])  # scores of a block: 32 columns of 128 rows, all of them
@pytest.mark.parametrize("dtype,store", [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.float64, None)])
def test_slices_choose_as_the_whole_does(monkeypatch, sequence, block, dtype, store):
    monkeypatch.setitem(BLOCK, "cpu", block)
    queries, landmarks, _ = sequence(dtype, store)
    for name, options in forms().items():
        for grad in (False, True):
            queries.requires_grad_(grad)
            whole = retrieve(queries, landmarks, **options)
            parts = zip(*(retrieve(queries, landmarks, rows, **options) for rows in CUTS), strict=True)
            for part, wanted in zip(parts, whole, strict=True):
                assert torch.equal(torch.cat(part, 1), wanted), (name, grad)


@pytest.mark.parametrize("block", [32 * 256, 2**20])  # scores of a block: 32 columns of 128 rows, all of them
def test_the_whole_is_no_slice(monkeypatch, sequence, block):
    """As many chunks as rows: number 0 changes nothing. A row sees the chunks before its number."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    queries, landmarks, _ = sequence(chunks=ROWS)
    expected = retrieve(queries, landmarks, noise="gumbel")
    indices, scores = retrieve_chunks(queries, landmarks, 4, noise="gumbel", generator=SEEDS)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(scores, expected[1], atol=2e-6, rtol=0)  # other blocks, other rounding
    for rows in CUTS:  # chunks that no row of the slice sees need not be there
        known = landmarks[:, : rows[1]]
        for result, wanted in zip(retrieve(queries, known, rows, noise="gumbel"), expected, strict=True):
            assert torch.equal(result, wanted[:, slice(*rows)])
    indices, _ = retrieve_chunks(queries[:, :3], landmarks, 8, first_row=5)
    assert (indices >= 0).sum(-1).tolist() == [[5, 6, 7]] * 2
    assert indices.amax(-1).tolist() == [[4, 5, 6]] * 2


def test_noise_is_that_of_the_row_in_its_sequence(sequence):
    queries, landmarks, _ = sequence()
    same = queries[:, :1].expand(-1, 30, -1)
    visible = torch.tensor([[0, CHUNKS]]).expand(1, 30, 2)
    first, second = (
        retrieve_chunks(same, landmarks, 4, visible=visible, noise="gumbel", generator=SEEDS, first_row=row)[0]
        for row in (0, 10)
    )
    assert torch.equal(first[:, 10:], second[:, :20])
    assert not torch.equal(first[:, :20], second[:, :20])


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_gradients_of_slices_add_up(sequence, noise):
    queries, landmarks, upstream = sequence()

    def gradients(cuts):
        leaves = queries.clone().requires_grad_(), landmarks.clone().requires_grad_()
        for rows in cuts:
            weights = chunk_weights(retrieve(*leaves, rows, noise=noise)[1])
            weights.backward(upstream[:, slice(*rows)])
        return [leaf.grad for leaf in leaves]

    (whole_q, whole_keys), (q, keys) = gradients([(0, ROWS)]), gradients(CUTS)
    torch.testing.assert_close(q, whole_q, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(keys, whole_keys, atol=2e-6, rtol=1e-5)


def test_gradient_of_a_slice_is_that_of_differences():
    generator = torch.Generator().manual_seed(2)
    q, keys = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 9))

    def weights(a, b):
        return chunk_weights(retrieve_chunks(a, b, 3, noise="gumbel", generator=SEEDS, first_row=5)[1])

    assert torch.autograd.gradcheck(weights, (q, keys))


@pytest.mark.parametrize("implementation", ["reference", "cpu", "auto"])
def test_attention_of_slices(gca_inputs, run_gca, implementation):
    """Groups of some rows over the whole store: outputs of the same bits, gradients of the store that add up."""
    tensors = gca_inputs(N=11, ragged=True)
    rows = ("q", "indices", "weights", "grad_out")
    whole = run_gca(tensors, implementation)
    parts = [
        run_gca(tensors | {name: tensors[name][:, start:stop] for name in rows}, implementation)
        for start, stop in ((0, 1), (1, 4), (4, 11))
    ]
    for name in ("out", "grad_q", "grad_weights"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), whole[name]), name
    for name in ("grad_k", "grad_v"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("first_row,text", [(-1, "first_row must be"), (3, "at least as many chunks as rows")])
def test_rows_beyond_the_sequence_are_refused(first_row, text):
    with pytest.raises(ValueError, match=text):
        retrieve_chunks(torch.zeros(1, 3, 4), torch.zeros(1, 5, 4), 2, first_row=first_row)
