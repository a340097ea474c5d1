"""The largest scores of every row as a mask of zeros and ones, with or without a random choice among exact zeros.

Legend: B sequences, T targets.

Notable: the host looks at the scores only where zeros are drawn at random (the number of draws depends on them).
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


def keep_largest(
    scores: Tensor, valid: Tensor, *, sparsity: float, generator: Generators | None, joint_fill: bool = False
) -> Tensor:
    """Mark the ``m_i = max(1, floor(sparsity * n_i))`` largest scores of the n_i valid targets of each row.

    Among equal scores the later positions win. Without a generator a score of exactly 0 is never kept. With one, the
    places that no positive score takes go to zero scores drawn by a permutation of the row's zeros.

    Args:
        scores: ``[B, T]``, >= 0 where valid; anything elsewhere.
        valid: ``[B, T]`` bool.
        sparsity: share to keep, in (0, 1].
        generator: one for all rows, drawn from in their order by the rows that need it, or one for each row.
        joint_fill: permute the zeros of every row as soon as zeros take more than ``1 - sparsity`` of any row.

    Returns:
        ``[B, T]`` zeros and ones in the dtype of ``scores``; 0 where not valid.
    """
    counts = valid.sum(1)
    budget = (counts.double() * sparsity).floor().clamp_min(1).long()
    # The scores are not negative, so with -1 the targets that are not valid come first and the zeros right after them.
    order = scores.masked_fill(~valid, -1.0).argsort(dim=1, stable=True)
    zero = valid & (scores == 0)
    if generator is not None:
        zeros = zero.sum(1)
        if joint_fill:
            # In float32, as published: a share of exactly 1 - sparsity does not exceed it.
            needy = (zeros / counts > 1 - sparsity).any().expand(len(scores))
        else:
            needy = counts - zeros < budget
        _shuffle_zeros(order, torch.where(needy, zeros, 0), first=scores.shape[1] - counts, generator=generator)
    place = torch.arange(scores.shape[1], device=scores.device)
    chosen = torch.zeros_like(valid).scatter_(1, order, place >= scores.shape[1] - budget[:, None])
    chosen &= valid if generator is not None else valid & ~zero
    return chosen.to(scores.dtype)


def _shuffle_zeros(order: Tensor, zeros: Tensor, *, first: Tensor, generator: Generators) -> None:
    """Permute, in place, the ``zeros[b]`` slots of row b of ``order`` ``[B, T]`` from slot ``first[b]`` on."""
    for row, (count, begin) in enumerate(torch.stack([zeros, first], dim=1).tolist()):
        source = generator if isinstance(generator, torch.Generator) else generator[row]
        if count:
            permutation = torch.randperm(count, generator=source, device=source.device).to(order.device)
            order[row, begin : begin + count] = order[row, begin : begin + count][permutation]
