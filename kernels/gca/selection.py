"""The best visible chunks of each query, block by block: nothing of size N x E is kept.

Notable: of a causal block of rows only the columns that some row may see are scored. A group of columns whose maximum
is not among the best K cannot hold a winner, so the exact selection looks at K groups. A decoding row over
millions of landmarks goes through them in blocks of columns, converting one block at a time. The rows of a sequence
are cut at fixed numbers, and a slice multiplies whole blocks: products of the same shape give the same bits.

Legend: B batch, N queries, R rows of a block, E stored chunks, W columns of a block, M model width, K retrieved chunks.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.gca.noise import gumbel

# Columns that are looked at together before the exact selection; blocks hold whole groups.
GROUP = 32
# Scores of a block: on a CPU they stay in the second level cache, on a GPU they keep it busy.
BLOCK = {"cpu": 2**20, "cuda": 2**22}
# Rows of a block of a sequence, however long it is and whoever holds it.
ROWS = 128
# Elements of landmarks that are converted at a time.
CONVERTED = 2**22


@dataclass(frozen=True)
class Place:
    """Where the queries stand among the rows of their sequence, which are numbered."""

    first: int
    """Number of the first query."""
    offset: int
    """Chunk number of row 0 of a causal selection."""
    fixed: bool
    """Whether blocks of rows are cut at fixed numbers."""

    @classmethod
    def make(cls, num_rows: int, num_chunks: int, first_row: int | None) -> "Place":
        """Place a slice at its rows; queries that are no slice, at the last chunks."""
        if first_row is None:
            return cls(0, num_chunks - num_rows, False)
        return cls(first_row, 0, True)

    def own(self, rows: slice) -> slice:
        """Return where the queries of some rows stand among the queries."""
        return slice(rows.start - self.first, rows.stop - self.first)

    def blocks(self, num_rows: int, step: int) -> Iterator[tuple[slice, slice]]:
        """Yield blocks of rows, and which of them are queries."""
        last = self.first + num_rows
        for start in range(self.first - self.first % step, last, step):
            stop = min(start + step, last)
            yield slice(start, start + step if self.fixed else stop), slice(max(start, self.first), stop)


@dataclass(frozen=True)
class Rules:
    """What a row may see and what is added to its scores."""

    visible: Tensor | None
    """int ``[B or 1, N, 2]`` ranges, bool ``[B or 1, N, E]``, or None: strictly earlier chunks."""
    noise: Tensor | None
    """``[B, N, E]`` to be added, or None."""
    seed: Tensor | None
    """Of the Gumbel noise, or None."""
    place: Place

    def stop(self, rows: slice, num_chunks: int) -> int:
        """Return the column after the last one that a row of the block may see; it may lie behind the chunks."""
        if self.visible is not None:
            return num_chunks
        last = max(0, self.place.offset + rows.stop - 1)  # no row of the block sees more than its last one
        last += -last % GROUP
        return last if self.place.fixed else min(num_chunks, last)

    def noisy(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return ``scores + noise`` ``[B, R, W]`` in their dtype, -inf where hidden; may change its argument."""
        if self.noise is not None:
            scores = scores + self.noise[:, self.place.own(rows), columns]
        elif self.seed is not None:
            scores = scores + gumbel(self.seed, scores.shape[0], rows, columns)
        return self._hide(scores, rows, columns)

    def _hide(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        if self.visible is not None and self.visible.dtype == torch.bool:
            return scores.masked_fill_(~self.visible[:, self.place.own(rows), columns], float("-inf"))
        # All rows of a causal block see the columns before its first row.
        offset = self.place.offset
        start = columns.start if self.visible is not None else max(columns.start, offset + rows.start)
        column = torch.arange(min(start, columns.stop), columns.stop, device=scores.device)
        if self.visible is None:
            own = torch.arange(rows.start, rows.stop, device=scores.device) + offset
            hidden = (column >= own[:, None])[None]
        else:
            first, last = self.visible[:, self.place.own(rows)].unsqueeze(-1).unbind(2)
            hidden = (column < first) | (column >= last)
        scores[..., start - columns.start :].masked_fill_(hidden, float("-inf"))
        return scores


@dataclass(frozen=True)
class _Found:
    """The best of the columns so far, best first, each ``[B, R, K]``."""

    noisy: Tensor
    scores: Tensor
    columns: Tensor

    def merge(self, later: "_Found", top_k: int) -> "_Found":
        """Keep the best of both; ties go to the earlier columns."""
        noisy, scores, columns = (
            torch.cat(pair, -1)
            for pair in ((self.noisy, later.noisy), (self.scores, later.scores), (self.columns, later.columns))
        )
        best, place = exact_top(noisy, min(top_k, noisy.shape[-1]))
        return _Found(best, scores.gather(-1, place), columns.gather(-1, place))


def select(q: Tensor, landmarks: Tensor, top_k: int, rules: Rules) -> tuple[Tensor, Tensor]:
    """Select without gradient.

    Args:
        q: ``[B, N, M]`` in the type of the scores.
        landmarks: ``[B, E, M]``, any float type.
        top_k: K.
        rules: what is visible, and the noise.

    Returns:
        Indices int32 ``[B, N, K]`` (-1 = empty) and scores without noise ``[B, N, K]`` (-inf at empty slots).
    """
    batch, num_rows, width = q.shape
    indices = torch.full((batch, num_rows, top_k), -1, dtype=torch.int32, device=q.device)
    scores = torch.full((batch, num_rows, top_k), float("-inf"), dtype=q.dtype, device=q.device)
    fixed = rules.place.fixed
    step = ROWS if fixed else max(1, _block(q) // max(1, batch * landmarks.shape[1]))
    # Read once, landmarks are converted block by block; else all of them, once.
    keys = landmarks if num_rows <= step and not fixed else landmarks.to(q.dtype)
    for block, rows in rules.place.blocks(num_rows, step):
        own, around = rules.place.own(rows), (rows.start - block.start, block.stop - rows.stop)
        query = q[:, own] * width**-0.5
        query = torch.nn.functional.pad(query, (0, 0, *around)) if any(around) else query
        found = None
        for columns in _column_blocks(query, keys, rules.stop(block, keys.shape[1])):
            scores_of_block = _scores(query, keys, columns).narrow(1, around[0], rows.stop - rows.start)
            part = _best(scores_of_block, rows, columns.start, top_k, rules)
            found = part if found is None else found.merge(part, top_k)
        if found is not None:
            filled, slots = found.noisy > float("-inf"), slice(0, found.noisy.shape[-1])
            indices[:, own, slots] = found.columns.masked_fill(~filled, -1).int()
            scores[:, own, slots] = found.scores.masked_fill(~filled, float("-inf"))
    return indices, scores


def _block(q: Tensor) -> int:
    return BLOCK.get(q.device.type, BLOCK["cpu"])


def _column_blocks(query: Tensor, keys: Tensor, stop: int) -> Iterator[slice]:
    batch, rows, width = query.shape
    step = _block(query) // (batch * rows)
    if keys.dtype != query.dtype:
        step = min(step, CONVERTED // (batch * width))
    step = max(GROUP, step - step % GROUP)
    return (slice(start, min(start + step, stop)) for start in range(0, min(stop, keys.shape[1]), step))


def _scores(query: Tensor, keys: Tensor, columns: slice) -> Tensor:
    """Multiply as if all the columns were there; returns the scores ``[B, R, W]`` of those that are."""
    part = keys[:, columns].to(query.dtype)
    there, missing = part.shape[1], columns.stop - columns.start - part.shape[1]
    if not missing:
        return _product(query, part)
    return _product(query, torch.nn.functional.pad(part, (0, 0, 0, missing)))[..., :there]


def _best(scores: Tensor, rows: slice, first_column: int, top_k: int, rules: Rules) -> _Found:
    noisy = rules.noisy(scores, rows, slice(first_column, first_column + scores.shape[-1]))
    best, place = top(noisy, min(top_k, scores.shape[-1]))
    return _Found(best, scores.gather(-1, place), place + first_column)


def _product(query: Tensor, keys: Tensor) -> Tensor:
    """Multiply ``[B, R, M]`` with ``[B, W, M]`` to ``[B, R, W]``."""
    if query.device.type != "cpu" or query.dtype != torch.float32 or query.shape[1] < GROUP or not _onednn_is_better():
        return torch.bmm(query, keys.transpose(1, 2))
    linear = torch.ops.mkldnn._linear_pointwise
    products = [linear(query[b], keys[b], None, "none", [], "") for b in range(query.shape[0])]
    return products[0][None] if len(products) == 1 else torch.stack(products)


@functools.cache
def _onednn_is_better() -> bool:
    """Say whether to multiply by oneDNN: PyTorch's MKL keeps its fastest code for Intel. Its result is checked once."""
    try:
        if b"GenuineIntel" in Path("/proc/cpuinfo").read_bytes() or not torch.backends.mkl.is_available():
            return False
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(37, 65, generator=generator), torch.randn(51, 65, generator=generator)
        result = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return torch.allclose(result.double(), left.double() @ right.double().T, atol=2e-5)
    except (OSError, AttributeError, RuntimeError):
        return False


def top(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select the largest of each row, ties to the lower column: ``[B, R, W]`` to values and columns ``[B, R, K]``.

    Values are float32 or float64 as the scores are, columns int64.

    The K best columns lie in the K groups of largest maximum (ties to the lower group): each group ahead of a column's
    own holds something that goes before it.
    """
    num_columns = scores.shape[-1]
    if num_columns <= 2 * GROUP * top_k:
        return exact_top(scores, top_k)
    if num_columns % GROUP:
        scores = torch.nn.functional.pad(scores, (0, -num_columns % GROUP), value=float("-inf"))
    groups = scores.unflatten(-1, (-1, GROUP))
    chosen = exact_top(groups.amax(-1), top_k)[1].sort(-1).values  # ascending, so that columns stay in order
    candidates = groups.gather(2, chosen.unsqueeze(-1).expand(*chosen.shape, GROUP)).flatten(2)
    values, place = exact_top(candidates, top_k)
    return values, chosen.gather(-1, place // GROUP) * GROUP + place % GROUP


def exact_top(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select as `top` ``[B, R, W]`` to ``[B, R, K]``, looking at every column."""
    if scores.dtype == torch.float64:
        values, columns = scores.sort(dim=-1, descending=True, stable=True)
        return values[..., :top_k], columns[..., :top_k]
    # One integer orders by score, then by lower column: the score's bits above, the flipped column below.
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = scores.shape[-1] - 1
    key = (ordered << 32) + (last - torch.arange(last + 1, device=scores.device))
    columns = last - (key.topk(top_k, -1).values & 0xFFFFFFFF)
    return scores.gather(-1, columns), columns
