"""From pieces of token ids to a `PieceCache`.

Legend: B batch, b pieces of a micro-batch, N slots of a row.
"""

from typing import Any

import torch
from torch import Tensor

from patches.parallel_context.cache import UNUSED, PieceCache
from patches.parallel_context.encode import CacheWriter, Piece, PieceAttention, encode_prefix, micro_batches, padded
from patches.parallel_context.families import check_positions
from patches.parallel_context.hook import ModelHook
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.positions import positions


def encode_context(
    hook: ModelHook,
    options: ParallelContext,
    *,
    rows: list[list[list[int]]],
    prefix: list[int],
    fingerprint: dict[str, Any],
) -> PieceCache:
    """Encode rows of pieces behind one prefix; the caller holds the model's scope."""
    pieces, following = place_pieces(rows, len(prefix), options)
    greatest = max([float(piece.positions.max()) for piece in pieces] + [len(prefix) - 1.0])
    check_positions(hook.model, greatest)
    implementation, workspace = options.implementation, options.workspace
    parts = encode_prefix(hook, prefix, implementation=implementation, workspace=workspace)
    width = len(prefix) + max(sum(map(len, row)) for row in rows)
    writer = CacheWriter(hook.num_layers, len(rows), width)
    writer.prefix(parts)
    for batch in micro_batches(pieces, options.micro_batch_tokens):
        tokens, places = padded(batch)
        attention = PieceAttention(
            places, parts, writer.write(batch), implementation=implementation, workspace=workspace
        )
        hook.forward(tokens.to(hook.device), places.to(hook.device), attention)
    slots = [_slots([piece for piece in pieces if piece.row == row], len(prefix), width) for row in range(len(rows))]
    segments, places = (torch.stack(x)[:, None] for x in zip(*slots, strict=True))
    return PieceCache(
        keys=writer.keys,
        values=writer.values,
        positions=_expand(places.to(following.dtype), writer.keys),
        segments=_expand(segments, writer.keys),
        next_position=following,
        lengths=[[len(text) for text in row] for row in rows],
        source_pieces=[list(range(1, len(row) + 1)) for row in rows],
        offsets=[len(prefix)] * len(rows),
        mode=options.position_mode,
        fingerprint=fingerprint,
    )


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
