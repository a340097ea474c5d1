"""Logits in tiles: some query tokens of some rows and heads against all the keys they may see.

Notable: a tile never exceeds the workspace, whatever the lengths. Half-precision keys are multiplied into float32
logits. Invisible keys carry the finite logit MASKED.

Legend: B batch, b rows and g kv heads of a tile, R query heads of a kv head, c query tokens of a tile, n key slots of
a part, K pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patches.parallel_context.key_groups import Block, KeyPart, Run, find_blocks
from patches.parallel_context.policies import MASKED
from patches.parallel_context.problem import Problem


@dataclass(frozen=True)
class TilePart:
    """The keys of one part that a tile sees, and their logits."""

    keys: Tensor
    """``[b, g, n, D]``."""
    values: Tensor
    runs: tuple[Run, ...]
    logits: Tensor
    """``[b, g, R, c, n]``."""
    hidden: Tensor | None
    """``[b or 1, g or 1, 1, c or 1, n]``."""
    column: int
    """Number of its first slot among all slots, own ones last."""


@dataclass(frozen=True)
class Tile:
    """Logits of some query tokens of a block."""

    rows: slice
    heads: slice
    tokens: slice
    query: Tensor
    """``[b, g, R, c, D]``."""
    parts: list[TilePart]
    num_pieces: int
    """Pieces of these rows."""
    num_groups: int
    """K + 2; 3 without detail."""


def cut_tiles(problem: Problem, *, detail: bool) -> Iterator[Tile]:
    """Yield tiles that together cover every query token of every row and head once.

    Args:
        problem: What to attend.
        detail: Tell pieces apart; False: all pieces of a row are group 1, own tokens group 2.
    """
    kv_heads, num_own = problem.own.keys.shape[1:3]
    if detail:
        blocks = problem.detailed_blocks()
    else:
        blocks = find_blocks(problem.context, problem.num_pieces, kv_heads, detail=False)
    ratio, tokens = problem.query.shape[1] // kv_heads, problem.query.shape[2]
    for block in blocks:
        slots = max(1, block.width + num_own)
        for rows, heads in _cut_block(block, problem.tile // (ratio * slots), kv_heads):
            logits = problem.tile // ((rows.stop - rows.start) * (heads.stop - heads.start) * ratio)
            step = _tokens(problem, logits, block.width, num_own)
            for first in range(0, tokens, step):
                yield _make(problem, block, rows, heads, slice(first, min(first + step, tokens)), detail=detail)


def _tokens(problem: Problem, logits: int, context: int, num_own: int) -> int:
    """Return how many query tokens of one head fit into a tile of so many logits."""
    known = problem.own.host_positions
    if problem.window is None or known is None:
        return max(1, logits // max(1, context + num_own))
    first = torch.searchsorted(known, known - problem.window, right=True)
    seen = int((torch.arange(num_own) - first).max()) + 1
    step = max(64, seen)  # small tiles cost calls, large ones see keys outside their windows
    while step > 1 and step * (context + min(seen + step, num_own)) > logits:
        step //= 2
    return step


def _cut_block(block: Block, most_cells: int, kv_heads: int) -> Iterator[tuple[slice, slice]]:
    """Split a block into rows, then heads, while one query token of all its cells exceeds the tile."""
    first, last, _ = block.heads.indices(kv_heads)
    if (block.rows.stop - block.rows.start) * (last - first) <= most_cells:
        yield block.rows, slice(first, last)
        return
    for row in range(block.rows.start, block.rows.stop):
        if last - first <= most_cells:
            yield slice(row, row + 1), slice(first, last)
            continue
        for head in range(first, last):
            yield slice(row, row + 1), slice(head, head + 1)


def _make(problem: Problem, block: Block, rows: slice, heads: slice, tokens: slice, *, detail: bool) -> Tile:
    groups = (problem.most_pieces if detail else 1) + 2
    query = problem.query.unflatten(1, (problem.own.keys.shape[1], -1))[rows, heads, :, tokens]
    tile = Tile(rows, heads, tokens, query, [], block.num_pieces, groups)
    column = 0
    for part, runs in zip(problem.context, block.runs, strict=True):
        if runs:
            tile.parts.append(_context_part(problem, part, runs, tile, column))
        column += part.keys.shape[2]
    own = _own_part(problem, tile, column)
    if own is not None:
        tile.parts.append(own)
    return tile


def _context_part(problem: Problem, part: KeyPart, runs: tuple[Run, ...], tile: Tile, column: int) -> TilePart:
    width = runs[-1].stop
    keys, values = (_of_rows(x, tile.rows)[:, tile.heads, :width] for x in (part.keys, part.values))
    if part.turned is not None:
        query = part.turned.query.unflatten(1, (part.keys.shape[1], -1))[tile.rows, tile.heads, :, tile.tokens]
        hidden = part.turned.hidden[tile.rows, None, None, tile.tokens, :width]
        return TilePart(keys, values, runs, _logits(problem, query, keys, hidden), hidden, column)
    hidden = None
    if problem.window is not None:
        assert part.positions is not None
        places = _of_rows(part.positions, tile.rows)
        places = (places if places.shape[1] == 1 else places[:, tile.heads])[:, :, None, None, :width]
        hidden = places <= _reach(problem, tile)
    return TilePart(keys, values, runs, _logits(problem, tile.query, keys, hidden), hidden, column)


def _own_part(problem: Problem, tile: Tile, column: int) -> TilePart | None:
    """Return the own keys that a tile's queries may see; those after its last query are left out."""
    rows, heads, tokens = tile.rows, tile.heads, tile.tokens
    own, num_own = problem.own, problem.own.keys.shape[2]
    late = num_own - problem.query.shape[2]
    stop = tokens.stop + late if own.causal else num_own
    if stop <= 0:
        return None
    start = _first_in_window(problem, rows, tokens.start + late)
    hidden: Tensor | None = None
    if own.causal and tokens.stop - tokens.start > 1:
        slot = torch.arange(start, stop, device=own.keys.device)
        last = torch.arange(tokens.start + late, stop, device=own.keys.device)
        hidden = (slot > last[:, None])[None, None, None]
    if own.valid is not None:
        invalid = ~own.valid[rows, None, None, None, start:stop]
        hidden = invalid if hidden is None else hidden | invalid
    if problem.window is not None:
        assert own.positions is not None
        far = own.positions[rows, None, None, None, start:stop] <= _reach(problem, tile)
        hidden = far if hidden is None else hidden | far
    keys, values = (x[rows, heads, start:stop] for x in (own.keys, own.values))
    run = Run(0, 1, stop - start, tile.num_groups - 1)
    return TilePart(keys, values, (run,), _logits(problem, tile.query, keys, hidden), hidden, column + start)


def _of_rows(x: Tensor, rows: slice) -> Tensor:
    return x[rows] if x.shape[0] > 1 else x


def _reach(problem: Problem, tile: Tile) -> Tensor:
    """Return the last position ``[b, 1, 1, c, 1]`` that a window hides."""
    assert problem.positions is not None and problem.window is not None
    return problem.positions[tile.rows, None, None, tile.tokens, None] - problem.window


def _first_in_window(problem: Problem, rows: slice, slot: int) -> int:
    """Return the first own slot inside the window of the query at ``slot``, where positions are known on the host."""
    known = problem.own.host_positions
    if problem.window is None or known is None or slot < 0:
        return 0
    first = [torch.searchsorted(row, row[slot] - problem.window, right=True) for row in known[rows]]
    return int(min(first))


def _logits(problem: Problem, query: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
    """Return ``scale q . k`` in float32 or better, soft-capped, MASKED where hidden: ``[b, g, R, c, n]``."""
    logits = multiply(query.flatten(2, 3), keys.mT, problem.dtype).mul_(problem.scale)
    if problem.softcap is not None:
        logits.div_(problem.softcap).tanh_().mul_(problem.softcap)
    logits = logits.unflatten(2, query.shape[2:4])
    return logits if hidden is None else logits.masked_fill_(hidden, MASKED)


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix product ``[b, g, m, n]`` of ``a`` and ``b`` in ``dtype``, whatever they are stored in.

    On a GPU half-precision factors go through the tensor cores with a float32 result; a float32 ``a`` with a
    half-precision ``b`` is rounded to it first.
    """
    if b.dtype == dtype:
        return a.to(dtype) @ b
    if b.device.type == "cuda" and dtype == torch.float32:
        batch = (a.shape[0], a.shape[1])
        left, right = a.to(b.dtype), b.expand(*batch, -1, -1)
        return torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=dtype).unflatten(0, batch)
    return a.to(dtype) @ b.to(dtype)
