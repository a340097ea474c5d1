"""Encode under policies that judge pieces one by one: keep the best pieces, evict slots inside each.

Notable: what is not kept is dropped after each micro-batch, so at most the kept pieces and one micro-batch are held.

Legend: B batch, b pieces of a micro-batch, G kv heads, N slots of a row, n slots of a piece, D head size, P prefix
length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patches.parallel_context.cache import PieceCache
from patches.parallel_context.encode import Piece, micro_batches
from patches.parallel_context.hook import ModelHook
from patches.parallel_context.key_groups import UNUSED, KeyPart
from patches.parallel_context.options import KeepPieces
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.piece_policy import KeptPiece, PieceJudge, Queries
from patches.parallel_context.positions import next_position


@dataclass
class _Row:
    """Pieces of one row, and what stays of them."""

    pieces: list[Piece]
    following: int | float
    """Position after all pieces."""
    kept: list[KeptPiece] = field(default_factory=list)
    scores: dict[int, float | None] = field(default_factory=dict)

    def add(self, kept: KeptPiece, policy: KeepPieces | None) -> None:
        """Take a judged piece and drop the worst beyond what the policy keeps."""
        self.kept.append(kept)
        self.scores[kept.piece.number] = kept.score
        if policy is not None and policy.needs_query:
            self.kept.sort(key=lambda one: (policy.rank(one.score or 0.0), one.piece.number))
            del self.kept[policy.keep :]

    def finish(self) -> list[KeptPiece]:
        """Return what stays, in document order."""
        return sorted(self.kept, key=lambda one: one.piece.number)


def encode_judged(
    hook: ModelHook,
    options: ParallelContext,
    *,
    pieces: list[Piece],
    following: Tensor,
    parts: list[KeyPart],
    queries: Queries | None,
) -> PieceCache:
    """Encode pieces behind the prefix ``parts`` and keep what the policies want.

    ``following`` ``[B]`` is the position after the pieces of each row.
    """
    policy = options.piece_policy
    offset = parts[0].keys.shape[2] if parts else 0
    rows = [
        _Row([piece for piece in pieces if piece.row == row], after) for row, after in enumerate(following.tolist())
    ]
    if policy is not None and policy.score == "random":
        chosen = [drawn_pieces(len(row.pieces), policy) for row in rows]
        pieces = [piece for piece in pieces if piece.number in chosen[piece.row]]
    judge = PieceJudge(hook, options, prefix=parts, queries=queries)
    width = 0 if queries is None else queries.tokens.shape[1]
    for batch in _batches(pieces, options.micro_batch_tokens, width):
        starts = [_query_start(piece, rows[piece.row], options, offset) for piece in batch]
        for kept in judge.judge(batch, torch.tensor(starts, dtype=following.dtype)):
            rows[kept.piece.row].add(kept, policy)
    return _assemble(rows, parts, options, following)


def drawn_pieces(num_pieces: int, policy: KeepPieces) -> list[int]:
    """Return the numbers (from 1) that a random policy keeps; the same for every row of so many pieces."""
    generator = torch.Generator().manual_seed(policy.seed)
    return sorted((torch.randperm(num_pieces, generator=generator)[: policy.keep] + 1).tolist())


def _batches(pieces: Sequence[Piece], limit: int, query_tokens: int) -> list[list[Piece]]:
    """Group pieces into micro-batches whose query pass stays within the limit too."""
    groups = []
    for batch in micro_batches(pieces, limit):
        count = max(1, limit // query_tokens) if query_tokens else len(batch)
        groups += [batch[first : first + count] for first in range(0, len(batch), count)]
    return groups


def _query_start(piece: Piece, row: _Row, options: ParallelContext, offset: int) -> int | float:
    """Return where the query begins that reads a piece alone."""
    if options.position_mode == "order":
        return offset + sum(len(one.tokens) for one in row.pieces[: piece.number])
    return offset + len(piece.tokens) if options.position_mode[1] == "L" else row.following


def _assemble(rows: list[_Row], parts: list[KeyPart], options: ParallelContext, following: Tensor) -> PieceCache:
    kept = [row.finish() for row in rows]
    offset = parts[0].keys.shape[2] if parts else 0
    lengths = [[len(one.piece.tokens) for one in row] for row in kept]
    if options.position_mode[-1] == "L":
        exact = options.fractional_positions
        after = [next_position(row, options.position_mode, offset, fractional=exact) for row in lengths]
        following = torch.tensor(after, dtype=following.dtype)
    layers = [_assemble_layer(kept, parts, layer, following.dtype) for layer in range(_num_layers(kept, parts))]
    keys, values, places, segments = (list(x) for x in zip(*layers, strict=True))
    scored = options.piece_policy is not None and options.piece_policy.needs_query
    return PieceCache(
        keys=keys,
        values=values,
        positions=places,
        segments=segments,
        next_position=following,
        lengths=lengths,
        source_pieces=[[one.piece.number for one in row] for row in kept],
        offsets=[offset] * len(rows),
        mode=options.position_mode,
        piece_scores=[_scores(row) for row in rows] if scored else None,
    )


def _scores(row: _Row) -> list[float] | None:
    return [float(row.scores[piece.number] or 0.0) for piece in row.pieces] or None


def _num_layers(kept: list[list[KeptPiece]], parts: list[KeyPart]) -> int:
    return len(parts) or len(next(row[0] for row in kept if row).layers)


def _assemble_layer(
    kept: list[list[KeptPiece]], parts: list[KeyPart], layer: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put prefix and pieces of all rows into one layer: keys, values, positions, segments."""
    found = [[one.layers[layer] for one in row] for row in kept]
    like = parts[layer].keys[0] if parts else next(row[0][0] for row in found if row)
    offset = parts[layer].keys.shape[2] if parts else 0
    width = offset + max(sum(keys.shape[1] for keys, _, _ in row) for row in found)
    per_head = any(places.shape[0] > 1 for row in found for _, _, places in row)
    heads, size = like.shape[0], like.shape[2]
    keys, values = (like.new_zeros(len(kept), heads, width, size) for _ in range(2))
    tables = (len(kept), heads if per_head else 1, width)
    positions = torch.zeros(tables, dtype=dtype, device=like.device)
    segments = torch.full(tables, UNUSED, device=like.device)
    for row, pieces in enumerate(found):
        if parts:
            keys[row, :, :offset], values[row, :, :offset] = parts[layer].keys[0], parts[layer].values[0]
            positions[row, :, :offset], segments[row, :, :offset] = torch.arange(offset, device=like.device), 0
        start = offset
        for number, (piece_keys, piece_values, places) in enumerate(pieces, 1):
            slots = slice(start, start + piece_keys.shape[1])
            keys[row, :, slots], values[row, :, slots] = piece_keys, piece_values
            positions[row, :, slots], segments[row, :, slots] = places.to(dtype), number
            start = slots.stop
    return keys, values, positions.expand(-1, heads, -1), segments.expand(-1, heads, -1)
