"""The reverse map of a retrieval: which slots chose each chunk, cut into pieces of bounded length.

Notable: everything stays on the device; table sizes are upper bounds from shapes, so nothing waits for a count. The
layers that share a retrieval share its map, handed around as one integer tensor.

Legend: B batch, N query groups, E stored chunks, K retrieved chunks, P pieces at most.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

PIECE = 16


def reverse_index(indices: Tensor, num_chunks: int) -> Tensor:
    """Sort a retrieval by chunk, once for all layers that attend to it.

    Args:
        indices: ``[B, N, K]`` integers, the chunk of each slot, -1 = empty; or ``[B, N, Hk, K]``, one retrieval per kv
            head.
        num_chunks: E, the number of stored chunks.

    Returns:
        An int32 tensor for the argument `reverse` of ``grouped_cross_attention``; not meant to be read.
    """
    if indices.dim() == 4:
        indices = indices.transpose(1, 2).flatten(0, 1)
    return ReverseMap.build(indices, num_chunks).pack()


@dataclass(frozen=True)
class ReverseMap:
    """Slots ordered by chunk, and the pieces each chunk's list is cut into; tables are int32."""

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

    @classmethod
    def build(cls, indices: Tensor, num_chunks: int) -> "ReverseMap":
        """Build the map of ``indices`` ``[B, N, K]`` (integers) over ``num_chunks`` = E chunks by one stable sort."""
        batch, total = indices.shape[0], indices.shape[0] * num_chunks
        place = indices.long() + torch.arange(batch, device=indices.device)[:, None, None] * num_chunks
        ordered, order = place.masked_fill(indices < 0, total).flatten().sort(stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(total + 1, device=indices.device))
        pieces = (bounds.diff() + PIECE - 1) // PIECE
        ends = pieces.cumsum(0)
        split = torch.where(pieces > 1, pieces, 0)
        chunk_part = split.cumsum(0) - split

        number = torch.arange(_num_pieces(indices.numel(), total), device=indices.device)
        chunk = torch.searchsorted(ends, number, right=True).clamp(max=total - 1)
        rank = number - (ends - pieces)[chunk]
        start = bounds[chunk] + rank * PIECE
        stop = torch.minimum(start + PIECE, bounds[chunk + 1])
        used = number < ends[-1]
        part = torch.where(pieces[chunk] > 1, chunk_part[chunk] + rank, -1)
        tables = (order, chunk, torch.where(used, start, 0), torch.where(used, stop, 0), part, chunk_part, pieces)
        return cls(*(table.int() for table in tables))

    @property
    def max_parts(self) -> int:
        """Rows the buffer of parts needs at most: 2 for PIECE + 1 entries, the shortest list that is split."""
        return 2 * self.order.numel() // (PIECE + 1)

    def pack(self) -> Tensor:
        """Join the tables."""
        return torch.cat(astuple(self))

    @classmethod
    def of(cls, indices: Tensor, num_chunks: int, packed: Tensor | None) -> "ReverseMap":
        """Undo `pack` for the map of ``indices`` ``[B, N, K]`` int32; build it where nothing was packed."""
        if packed is None:
            return cls.build(indices, num_chunks)
        return cls(*packed.split(_sizes(indices, num_chunks)))


def check_reverse(packed: Tensor, indices: Tensor, num_chunks: int) -> None:
    """Refuse what ``reverse_index(indices, num_chunks)`` cannot have returned for ``indices`` ``[B, N, K]``.

    Raises:
        ValueError: on another type, size or device.
    """
    wanted = sum(_sizes(indices, num_chunks))
    if packed.dtype != torch.int32 or packed.shape != (wanted,) or packed.device != indices.device:
        raise ValueError(
            f"reverse must be reverse_index(indices, {num_chunks}), int32 [{wanted}] on {indices.device}, "
            f"got {packed.dtype} {list(packed.shape)} on {packed.device}"
        )


def _sizes(indices: Tensor, num_chunks: int) -> list[int]:
    """Return the lengths of the tables."""
    total, num_slots = indices.shape[0] * num_chunks, indices.numel()
    return [num_slots, *[_num_pieces(num_slots, total)] * 4, total, total]


def _num_pieces(num_slots: int, total: int) -> int:
    return num_slots // PIECE + min(total, num_slots)
