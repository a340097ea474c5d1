"""From pieces of token ids to a `PieceCache`.

Legend: B batch, b pieces of a micro-batch, G kv heads, N slots of a row, P prefix length, L layers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patches.parallel_context.cache import PieceCache
from patches.parallel_context.encode import (
    AttentionReceived,
    CacheWriter,
    Piece,
    PieceAttention,
    encode_prefix,
    micro_batches,
    padded,
)
from patches.parallel_context.families import check_positions
from patches.parallel_context.hook import ModelHook
from patches.parallel_context.judged_encoder import encode_judged
from patches.parallel_context.key_groups import UNUSED, KeyPart
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.piece_policy import Queries
from patches.parallel_context.positions import positions
from patches.parallel_context.streaming import encode_streaming


@dataclass(frozen=True)
class EncodeRequest:
    """What to encode."""

    rows: list[list[list[int]]]
    prefix: list[int]
    queries: Queries | None


def encode_context(hook: ModelHook, options: ParallelContext, request: EncodeRequest) -> PieceCache:
    """Encode rows of pieces behind one prefix; the caller holds the model's scope."""
    if options.eviction is not None and options.eviction.method == "streaming":
        rows = [encode_streaming(hook, options, prefix=request.prefix, pieces=row) for row in request.rows]
        return replace(PieceCache.stack(rows), fingerprint=hook.fingerprint)
    offset = len(request.prefix)
    pieces, following = place_pieces(request.rows, offset, options)
    greatest = max([float(piece.positions.max()) for piece in pieces] + [offset - 1.0])
    check_positions(hook.model, greatest)
    parts = encode_prefix(hook, request.prefix, implementation=options.implementation, workspace=options.workspace)
    late = options.eviction is not None and options.eviction.stage == "query"
    if not pieces or (options.piece_policy is None and (options.eviction is None or late)):
        return _encode_all(hook, options, request, pieces=pieces, following=following, parts=parts)
    state = encode_judged(hook, options, pieces=pieces, following=following, parts=parts, queries=request.queries)
    return replace(state, fingerprint=hook.fingerprint)


def place_pieces(rows: list[list[list[int]]], offset: int, options: ParallelContext) -> tuple[list[Piece], Tensor]:
    """Give every piece its positions and slots; returns the first positions after them ``[B]`` too."""
    pieces, following = [], []
    for row, texts in enumerate(rows):
        lengths = [len(text) for text in texts]
        places, after = positions(lengths, options.position_mode, offset, fractional=options.fractional_positions)
        slot = offset
        for number, (text, place) in enumerate(zip(texts, places, strict=True), 1):
            pieces.append(Piece(row, number, text, place, slot))
            slot += len(text)
        following.append(after)
    return pieces, torch.tensor(following, dtype=torch.float64 if options.fractional_positions else torch.int64)


def _encode_all(
    hook: ModelHook,
    options: ParallelContext,
    request: EncodeRequest,
    *,
    pieces: list[Piece],
    following: Tensor,
    parts: list[KeyPart],
) -> PieceCache:
    """Encode without policies: keys go straight to their slots."""
    rows, offset = request.rows, len(request.prefix)
    width = offset + max(sum(map(len, row)) for row in rows)
    writer = CacheWriter(hook.num_layers, len(rows), width)
    writer.prefix(parts)
    received = AttentionReceived(hook.num_layers, len(rows), width) if _sums_prompt(options) and pieces else None
    for batch in micro_batches(pieces, options.micro_batch_tokens):
        tokens, places = padded(batch)
        attention = PieceAttention(
            places,
            parts,
            writer.write(batch),
            implementation=options.implementation,
            workspace=options.workspace,
            watch=None if received is None else received.watch(batch),
        )
        hook.forward(tokens.to(hook.device), places.to(hook.device), attention)
    slots = [_slots([piece for piece in pieces if piece.row == row], offset, width) for row in range(len(rows))]
    segments, places = (torch.stack(x)[:, None] for x in zip(*slots, strict=True))
    return PieceCache(
        keys=writer.keys,
        values=writer.values,
        positions=_expand(places.to(following.dtype), writer.keys),
        segments=_expand(segments, writer.keys),
        next_position=following,
        lengths=[[len(text) for text in row] for row in rows],
        source_pieces=[list(range(1, len(row) + 1)) for row in rows],
        offsets=[offset] * len(rows),
        mode=options.position_mode,
        received=None if received is None else received.layers,
        fingerprint=hook.fingerprint,
    )


def _sums_prompt(options: ParallelContext) -> bool:
    """Say whether slots are judged by the rows of the prompt too: H2O over one piece, as published."""
    eviction = options.eviction
    return options.degree == 1 and eviction is not None and (eviction.method, eviction.stage) == ("h2o", "query")


def _slots(pieces: list[Piece], offset: int, width: int) -> tuple[Tensor, Tensor]:
    """Return segments and positions ``[N]`` of a row."""
    segments = torch.full((width,), UNUSED)
    places = torch.zeros(width, dtype=torch.float64)
    segments[:offset], places[:offset] = 0, torch.arange(offset)
    for piece in pieces:
        slots = slice(piece.slot, piece.slot + len(piece.tokens))
        segments[slots], places[slots] = piece.number, piece.positions
    return segments, places


def _expand(table: Tensor, layers: list[Tensor]) -> list[Tensor]:
    """Share ``[B, 1, N]`` among heads and layers, one copy per device."""
    copies = {keys.device: table.to(keys.device) for keys in layers}
    return [copies[keys.device].expand(-1, keys.shape[1], -1) for keys in layers]
