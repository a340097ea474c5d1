"""Buckets by position against a loop over targets."""

from itertools import pairwise

import pytest
import torch

from evaluation.position_loss import bucket_nll


@pytest.mark.parametrize("edges", [[0, 1, 4, 9, 20], [1, 13], [3, 5, 6], [0, 1], [12, 40, 50]])
@pytest.mark.parametrize("masked", [False, True])
def test_buckets_equal_a_loop(edges, masked):
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/8 add up exactly in any order.
    nll = torch.randint(100, (3, 12), generator=generator) / 8
    valid = torch.rand(3, 12, generator=generator) < 0.6 if masked else None
    sums, counts = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for row in range(3):
        for index in range(12):
            for bucket, (low, high) in enumerate(pairwise(edges)):
                if low <= index + 1 < high and (valid is None or valid[row, index]):
                    sums[bucket] += float(nll[row, index])
                    counts[bucket] += 1
    given = nll if valid is None else nll.masked_fill(~valid, float("nan"))
    ours = bucket_nll(given, valid, edges)
    assert (ours[0].tolist(), ours[1].tolist()) == (sums, counts)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.int64
    row_sums = [bucket_nll(given[row], None if valid is None else valid[row], edges)[0] for row in range(3)]
    assert torch.equal(torch.stack(row_sums).sum(0), ours[0])


def test_16_bit_losses_are_summed_in_float32():
    nll = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    assert bucket_nll(nll, None, [1, 4097])[0].item() == 4096 * 1.0078125


@pytest.mark.parametrize("edges", [[3], [0, 4, 4], [5, 2], [-1, 4]])
def test_edges_must_ascend(edges):
    with pytest.raises(ValueError, match="edges"):
        bucket_nll(torch.zeros(1, 4), None, edges)


@pytest.mark.parametrize("valid", [torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4)])
def test_valid_must_fit(valid):
    with pytest.raises(ValueError, match="valid"):
        bucket_nll(torch.zeros(1, 4), valid, [0, 4])
