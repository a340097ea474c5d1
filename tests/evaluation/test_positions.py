"""Position buckets."""

import itertools

import numpy as np
import pytest

from evaluation.positions import bucket_sums, position_edges, position_report


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100, 16380])
def test_edges_cover_every_position_once(length):
    edges = position_edges(length)
    assert edges[0] == 0
    assert edges[-1] == length
    assert all(a < b for a, b in itertools.pairwise(edges))


def test_edges_of_all_lengths_lie_on_one_grid():
    long = position_edges(16384)
    assert len(long) < 60
    assert set(position_edges(300)) - {300} <= set(long)
    assert {2**i for i in range(14)} <= set(long)


def test_sums_are_those_of_the_slices():
    values = np.random.default_rng(0).random(100)
    edges = position_edges(100)
    expected = [values[a:b].sum() for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(bucket_sums(values, edges), expected)
    report = position_report(values, np.full(100, 3))
    assert report["position_counts"] == [3 * (b - a) for a, b in itertools.pairwise(edges)]


def test_wrong_sizes_are_explained():
    with pytest.raises(ValueError, match="at least 1"):
        position_edges(0)
    with pytest.raises(ValueError, match="last edge"):
        bucket_sums([1.0, 2.0], [0, 3])
