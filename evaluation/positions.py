"""Loss by position in the context, in buckets whose edges do not depend on the length measured.

Position p of a window is the index of the token that predicts, so p + 1 tokens of context were seen.
"""

from collections.abc import Sequence

import numpy as np


def position_edges(length: int, *, per_octave: int = 4) -> list[int]:
    """Return bucket edges from 0 to ``length``, ``per_octave`` for each doubling.

    Bucket j holds the positions ``edges[j] <= p < edges[j + 1]``. All edges below ``length`` are the same for every
    length, so curves of different lengths lie on one grid.
    """
    if length < 1 or per_octave < 1:
        raise ValueError(f"length and per_octave must be at least 1, got {length} and {per_octave}")
    edges, power = {0, length}, 0
    while (edge := int(2 ** (power / per_octave))) < length:
        edges.add(edge)
        power += 1
    return sorted(edges)


def bucket_sums(values: Sequence[float] | np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Sum ``values`` ``[T]`` over the buckets of ``edges`` (the last edge is T); float64 ``[len(edges) - 1]``."""
    array = np.asarray(values, dtype=np.float64)
    if edges[-1] != array.size:
        raise ValueError(f"the last edge must be the number of positions, got {edges[-1]} for {array.size}")
    return np.add.reduceat(array, np.asarray(edges[:-1]))


def position_report(nll_sum: np.ndarray, counts: np.ndarray) -> dict[str, list]:
    """Return ``position_edges``, ``position_nll_sum`` and ``position_counts`` as plain lists."""
    edges = position_edges(len(nll_sum))
    return {
        "position_edges": edges,
        "position_nll_sum": bucket_sums(nll_sum, edges).tolist(),
        "position_counts": [int(count) for count in bucket_sums(counts, edges)],
    }
