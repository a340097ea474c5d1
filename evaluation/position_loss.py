"""Summed loss by position of the target, in buckets.

Legend: B sequences, T targets (index t is the token at position p = t + 1), K buckets.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def bucket_nll(nll: Tensor, valid: Tensor | None, edges: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sum the losses of every bucket: the target at position p belongs to ``edges[k] <= p < edges[k + 1]``.

    Args:
        nll: ``[B, T]`` or ``[T]``, any floating dtype; targets that are not valid may hold anything.
        valid: bool in the shape of ``nll``, None = all.
        edges: K + 1 ascending positions; targets outside of them are left out.

    Returns:
        Sums ``[K]`` (float32, or float64 for float64 losses) and counts ``[K]`` int64.

    Raises:
        ValueError: shapes that differ, or edges that do not ascend.
    """
    if len(edges) < 2 or any(low >= high or low < 0 for low, high in pairwise(edges)):
        raise ValueError(f"edges must be at least two ascending positions from 0 up, got {list(edges)}")
    counted = torch.ones_like(nll, dtype=torch.bool) if valid is None else valid
    if counted.shape != nll.shape or counted.dtype != torch.bool:
        raise ValueError(
            f"valid must be bool in the shape of nll {list(nll.shape)}, got {counted.dtype} {list(counted.shape)}"
        )
    kept = nll.to(torch.promote_types(nll.dtype, torch.float32)).masked_fill(~counted, 0.0)
    columns = [slice(max(low - 1, 0), max(high - 1, 0)) for low, high in pairwise(edges)]
    sums = torch.stack([kept[..., column].sum() for column in columns])
    return sums, torch.stack([counted[..., column].sum() for column in columns])
