"""The reverse map of a retrieval: which slots chose each chunk, cut into pieces of bounded length.

Notable: everything stays on the device; table sizes are upper bounds from shapes, so nothing waits for a count.

Legend: B batch, N query groups, E stored chunks, K retrieved chunks, P pieces at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 16


@dataclass(frozen=True)
class ReverseMap:
    """Slots ordered by chunk, and the pieces each chunk's list is cut into; tables are int32."""

    max_parts: int
    """Rows the buffer of parts needs at most."""
    order: Tensor
    """``[B N K]`` slot numbers, ordered by chunk, then by slot; empty slots last."""
    piece_chunk: Tensor
    """``[P]`` chunk (b E + e) of each piece."""
    piece_start: Tensor
    """``[P]`` first entry in `order`; equal to `piece_stop` for unused pieces."""
    piece_stop: Tensor
    piece_part: Tensor
    """``[P]`` row in the buffer of parts, -1 if the chunk has one piece only."""
    chunk_part: Tensor
    """``[B E]`` first row of the chunk's parts."""
    chunk_pieces: Tensor
    """``[B E]`` number of pieces."""


def reverse_map(indices: Tensor, num_chunks: int) -> ReverseMap:
    """Build the map of ``indices [B, N, K]`` over ``num_chunks`` = E chunks by one stable sort."""
    batch, total, num_slots = indices.shape[0], indices.shape[0] * num_chunks, indices.numel()
    place = indices.long() + torch.arange(batch, device=indices.device)[:, None, None] * num_chunks
    ordered, order = place.masked_fill(indices < 0, total).flatten().sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(total + 1, device=indices.device))
    pieces = (bounds.diff() + PIECE - 1) // PIECE
    ends = pieces.cumsum(0)
    split = torch.where(pieces > 1, pieces, 0)
    chunk_part = split.cumsum(0) - split

    number = torch.arange(num_slots // PIECE + min(total, num_slots), device=indices.device)
    chunk = torch.searchsorted(ends, number, right=True).clamp(max=total - 1)
    rank = number - (ends - pieces)[chunk]
    start = bounds[chunk] + rank * PIECE
    stop = torch.minimum(start + PIECE, bounds[chunk + 1])
    used = number < ends[-1]
    part = torch.where(pieces[chunk] > 1, chunk_part[chunk] + rank, -1)
    tables = (order, chunk, torch.where(used, start, 0), torch.where(used, stop, 0), part, chunk_part, pieces)
    # Parts an entry: at most 2 for PIECE + 1 entries, the shortest list that is split.
    return ReverseMap(2 * num_slots // (PIECE + 1), *(table.int() for table in tables))
