"""Keys in groups: prefix, pieces, own tokens; and the blocks of rows and heads whose groups have the same sizes.

Notable: slots are sorted by group, so groups are slices, and equal groups side by side are one reshaped view (a run).
Nothing is indexed by a one-hot, and no key is copied.

Legend: B batch, G kv heads, N key slots, D head size, K pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

UNUSED = -2
"""Segment of slots that hold nothing."""
Counts = tuple[int, ...]
"""Slots of group 0 (prefix), 1 .. K (pieces) and, optionally, K + 1 (own), in this order."""


@dataclass(frozen=True)
class Run:
    """``count`` groups of ``size`` slots each, from slot ``start`` on; the first is group ``first``."""

    start: int
    count: int
    size: int
    first: int

    @property
    def stop(self) -> int:
        """Slot after the last one."""
        return self.start + self.count * self.size

    @property
    def groups(self) -> slice:
        """Numbers of the groups."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class Turned:
    """Queries turned for the keys of one part, whose distances are not those of the positions."""

    query: Tensor
    """``[B, H, T, D]``."""
    hidden: Tensor
    """``[B, T, N]``, True where a key is hidden; windows do not apply."""


@dataclass(frozen=True)
class KeyPart:
    """Keys and values with slots sorted by group; unused slots come last."""

    keys: Tensor
    """``[B or 1, G, N, D]``."""
    values: Tensor
    counts: tuple[tuple[Counts, ...], ...]
    """Per row (or one for all) and per head (or one for all)."""
    positions: Tensor | None = None
    """``[B or 1, G or 1, N]``, needed where a window measures distances."""
    turned: Turned | None = None

    def last_rows(self, count: int) -> "KeyPart":
        """Return the part as the last ``count`` query tokens see it."""
        if self.turned is None:
            return self
        query, hidden = self.turned.query, self.turned.hidden
        return replace(self, turned=Turned(query[:, :, -count:], hidden[:, -count:]))

    def at(self, row: int, head: int) -> Counts:
        """Return the counts of a row and head."""
        heads = self.counts[row if len(self.counts) > 1 else 0]
        return heads[head if len(heads) > 1 else 0]


@dataclass(frozen=True)
class Block:
    """Neighbouring rows and heads whose groups have the same sizes in every part."""

    rows: slice
    heads: slice
    runs: tuple[tuple[Run, ...], ...]
    """Runs of each part."""
    num_pieces: int
    """Pieces of these rows, those without a slot here included."""

    @property
    def width(self) -> int:
        """Slots of all parts together."""
        return sum(run.count * run.size for runs in self.runs for run in runs)


def find_runs(counts: Counts, most_pieces: int, *, detail: bool = True) -> tuple[Run, ...]:
    """Return the runs of one part; without detail all pieces are one group (and the part has no own slots)."""
    if not detail:
        counts, most_pieces = (counts[0], sum(counts[1:])), 1
    runs: list[Run] = []
    start = 0
    for group, size in enumerate(counts):
        last = runs[-1] if runs else None
        # Only pieces join a run: prefix and own tokens are weighed in other ways.
        if last and last.first > 0 and group <= most_pieces and (last.size, last.first + last.count) == (size, group):
            runs[-1] = Run(last.start, last.count + 1, size, last.first)
        elif size:
            runs.append(Run(start, 1, size, group))
        start += size
    return tuple(runs)


def find_blocks(
    parts: Sequence[KeyPart], num_pieces: Sequence[int], num_heads: int, *, detail: bool = True
) -> list[Block]:
    """Cut rows and heads into blocks.

    Args:
        parts: Parts of the context.
        num_pieces: Pieces of each row.
        num_heads: G.
        detail: Tell pieces apart; False: all pieces of a row are one group.
    """
    per_head = any(len(heads) > 1 for part in parts for heads in part.counts)
    heads, most = range(num_heads if per_head else 1), max(num_pieces, default=0)

    def runs(row: int, head: int) -> tuple[tuple[Run, ...], ...]:
        return tuple(find_runs(part.at(row, head), most, detail=detail) for part in parts)

    tables = [tuple(runs(row, head) for head in heads) for row in range(len(num_pieces))]
    blocks = []
    for (table, pieces), same_rows in groupby(range(len(tables)), key=lambda row: (tables[row], num_pieces[row])):
        rows = list(same_rows)
        for found, same_heads in groupby(heads, key=lambda head, table=table: table[head]):  # type: ignore[misc]
            chosen = list(same_heads)
            head_slice = slice(chosen[0], chosen[-1] + 1) if per_head else slice(None)
            blocks.append(Block(slice(rows[0], rows[-1] + 1), head_slice, found, pieces))
    return blocks


def count_groups(segments: Tensor, num_pieces: int) -> tuple[tuple[Counts, ...], ...]:
    """Count the slots of every group of ``segments`` ``[B, G, N]`` (0, 1 .. K, -1 own, -2 unused), per row and head."""
    index = torch.where(segments == -1, num_pieces + 1, segments)
    index = torch.where(segments < -1, num_pieces + 2, index).long()
    counts = torch.zeros(*segments.shape[:2], num_pieces + 3, dtype=torch.long, device=segments.device)
    counts.scatter_add_(-1, index, torch.ones_like(index))
    rows = [[tuple(head[:-1]) for head in row] for row in counts.tolist()]
    return tuple((row[0],) if len(set(row)) == 1 else tuple(row) for row in rows)
