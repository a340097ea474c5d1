"""Memory bounds, measured by allocator events."""

import pytest
import torch

from benchmarks.measure import allocations
from kernels.gca import grouped_cross_attention, retrieve_chunks
from kernels.sliding_window import sliding_window_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gca_layer_of_16k_tokens(dtype):
    groups, rows, top_k, heads, size = 256, 64, 8, 4, 32
    q, k, v = (torch.randn(1, groups, rows, heads, size).to(dtype).requires_grad_() for _ in range(3))
    indices = torch.randint(0, groups, (1, groups, top_k), dtype=torch.int32)
    weights = torch.rand(1, groups, top_k, requires_grad=True)
    grad_out = torch.randn_like(q)
    peak, largest = allocations(lambda: grouped_cross_attention(q, k, v, indices, weights).backward(grad_out))
    results = 4 * q.nbytes + 2 * groups * top_k * heads * rows * 4
    assert peak <= 1.75 * results
    assert q.nbytes <= largest <= 1.25 * q.nbytes


def test_gca_decoding_reads_the_chosen_chunks_only():
    q, store = torch.randn(1, 1, 1, 2, 16), torch.randn(1, 4000, 16, 2, 16)
    indices, weights = torch.tensor([[[5, 3999, -1, 5]]]), torch.rand(1, 1, 4)
    peak, _ = allocations(lambda: grouped_cross_attention(q, store, store, indices, weights))
    assert peak < store.nbytes / 100
    expected = grouped_cross_attention(q, store, store, indices, weights, implementation="reference")
    torch.testing.assert_close(grouped_cross_attention(q, store, store, indices, weights), expected)


def test_retrieval_without_gradient():
    queries, landmarks = torch.randn(1, 8192, 4), torch.randn(1, 8192, 4)
    for noise in (None, "gumbel"):
        peak, largest = allocations(lambda noise=noise: retrieve_chunks(queries, landmarks, 8, noise=noise))
        assert peak < 0.75 * 4 * 8192**2
        assert largest <= 8 * 2**22


def test_retrieval_of_one_row_converts_landmarks_in_blocks():
    queries, landmarks = torch.randn(1, 1, 64), torch.randn(1, 300_000, 64, dtype=torch.bfloat16)
    peak, largest = allocations(lambda: retrieve_chunks(queries, landmarks, 8))
    assert peak <= 6 * 2**22 and largest <= 4 * 2**22


def test_retrieval_gradient_keeps_the_chosen_scores_only():
    queries, landmarks = (torch.randn(1, 2048, 64, requires_grad=True) for _ in range(2))
    _, scores = retrieve_chunks(queries, landmarks, 4)
    peak, _ = allocations(lambda: scores.nan_to_num(neginf=0.0).sum().backward())
    assert peak < 2048**2 * 4


def test_sliding_window_is_not_quadratic():
    q, k, v = (torch.randn(1, 16384, 2, 16, requires_grad=True) for _ in range(3))
    slopes, grad_out = torch.tensor([0.5, 0.1]), torch.randn(1, 16384, 2, 16)
    peak, _ = allocations(lambda: sliding_window_attention(q, k, v, 513, alibi_slopes=slopes).backward(grad_out))
    assert peak < 0.02 * 2 * 4 * 16384**2
