"""Choosing among the slots of an encoded context, head by head.

Legend: B batch, H heads, G kv heads, N key slots, n kept slots, O observed rows, K pieces.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patches.parallel_context.key_groups import UNUSED, KeyPart, count_groups
from patches.parallel_context.problem import Problem
from patches.parallel_context.tiled import attend_tiled

Kept = Sequence[Sequence[Tensor]]
"""Slots ``[n]`` to keep, ascending, per row and kv head; n may differ."""


def slot_segments(part: KeyPart, batch: int, num_heads: int) -> Tensor:
    """Return the segments of a part's slots ``[B, G, N]`` on the host: 0 prefix, 1 .. K pieces, -2 unused."""
    segments = torch.full((batch, num_heads, part.keys.shape[2]), UNUSED)
    for row in range(batch):
        for head in range(num_heads):
            counts = torch.tensor(part.at(row, head))
            ids = torch.arange(len(counts)).repeat_interleave(counts)
            segments[row, head, : len(ids)] = ids
    return segments


def keep_slots(part: KeyPart, segments: Tensor, kept: Kept, most_pieces: int) -> KeyPart:
    """Copy the kept slots into a part of their own.

    Args:
        part: Keys ``[B, G, N, D]``.
        segments: `slot_segments` of it.
        kept: What stays.
        most_pieces: K.
    """
    device, shape = part.keys.device, part.keys.shape
    index, used = slot_table(kept)
    chosen = segments.gather(-1, index).masked_fill(~used, UNUSED)
    counts = tuple(tuple(head[:-1] for head in row) for row in count_groups(chosen, most_pieces))
    index = index.to(device)
    full = index[..., None].expand(-1, -1, -1, shape[3])
    places = None
    if part.positions is not None:
        places = part.positions.expand(*shape[:3]).gather(-1, index)
    return replace(
        part, keys=part.keys.gather(2, full), values=part.values.gather(2, full), counts=counts, positions=places
    )


def slot_table(kept: Kept) -> tuple[Tensor, Tensor]:
    """Return kept slots as ``[B, G, n]``, padded with 0, and which of them are real."""
    width = max(len(slots) for row in kept for slots in row)
    index = torch.zeros(len(kept), len(kept[0]), width, dtype=torch.long)
    used = torch.zeros(index.shape, dtype=torch.bool)
    for row, heads in enumerate(kept):
        for head, slots in enumerate(heads):
            index[row, head, : len(slots)] = slots
            used[row, head, : len(slots)] = True
    return index, used


def observe(problem: Problem, observed: Tensor) -> Tensor:
    """Return the weights that rows pay the slots, summed over the observed rows.

    Args:
        problem: An attention call, under its policy.
        observed: ``[B, T]`` on the host, True for the rows that count.

    Returns:
        ``[B, G, R, N + M]``, own slots last, float32 or better.
    """
    rows = observed.any(0).nonzero()
    count = observed.shape[1] - int(rows[0]) if len(rows) else 1
    watched = replace(problem, observed=observed.to(problem.query.device)).last_rows(count)
    columns = attend_tiled(watched, frozenset({"columns"})).columns
    assert columns is not None
    return columns.unflatten(1, (problem.own.keys.shape[1], -1))


def last_rows(lengths: Sequence[int], width: int, count: int) -> Tensor:
    """Mark the last ``count`` valid tokens of every row (0: all) in ``[B, T]``."""
    step = torch.arange(width)
    stop = torch.tensor(lengths)[:, None]
    return (step < stop) & ((step >= stop - count) if count else True)
