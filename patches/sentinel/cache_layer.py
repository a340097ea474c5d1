"""Storage that grows at its end: keys and values of one layer, and what is known of each entry.

Legend: B batch, P physical entries, T new entries, H kv heads, D head size.
"""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


def roomy_size(size: int) -> int:
    """Return the entries to allocate for `size`: appending costs a constant on average, the slack stays small."""
    return size + size // 8 + 256


def grown(buffer: Tensor, size: int, new: Tensor, dim: int) -> Tensor:
    """Write `new` ``[..., T, ...]`` behind the first `size` entries of a buffer along `dim`, in place if it fits.

    Returns:
        The buffer, or a larger one that holds what it held.
    """
    total = size + new.shape[dim]
    if total > buffer.shape[dim]:
        shape = list(buffer.shape)
        shape[dim] = roomy_size(total)
        larger = buffer.new_empty(shape)
        larger.narrow(dim, 0, size).copy_(buffer.narrow(dim, 0, size))
        buffer = larger
    buffer.narrow(dim, size, new.shape[dim]).copy_(new)
    return buffer


class EvictingLayer(CacheLayerMixin):
    """Keys and values ``[B, H, P, D]`` of one layer.

    Without gradients they are the front of a larger buffer that is written in place. With gradients they are
    concatenated, since an in-place write would invalidate what the graph has saved.
    """

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first keys and values ``[B, H, T, D]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.hold(key_states[:, :, :0].clone(), value_states[:, :, :0].clone())

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Store exactly these keys and values ``[B, H, P, D]``."""
        self._key_buffer, self._value_buffer = self.keys, self.values = keys, values
        self.is_initialized = True

    @property
    def length(self) -> int:
        """Physical entries."""
        return self.keys.shape[2] if self.is_initialized else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, H, T, D]``; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            self.hold(torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2))
        else:
            size, total = self.length, self.length + key_states.shape[2]
            self._key_buffer = grown(self._key_buffer, size, key_states, 2)
            self._value_buffer = grown(self._value_buffer, size, value_states, 2)
            self.keys, self.values = self._key_buffer[:, :, :total], self._value_buffer[:, :, :total]
        return self.keys, self.values

    def select(self, order: Tensor) -> None:
        """Keep entries ``order`` [B, P'] of each row, in storage of exactly their size."""
        if self.is_initialized:
            order = order.to(self.keys.device)
            self.hold(_rows(self.keys, order), _rows(self.values, order))

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.keys = self.values = self._key_buffer = self._value_buffer = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` entries."""
        if self.is_initialized:
            size = self.length + tokens_to_remove
            self.hold(self.keys[:, :, :size].clone(), self.values[:, :, :size].clone())

    def choose_rows(self, rows: Tensor) -> None:
        """Replace the batch by the rows ``[B']`` of it."""
        if self.is_initialized:
            rows = rows.to(self.keys.device)
            self.hold(self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes of the entries."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def allocated_bytes(self) -> int:
        """Bytes of the entries and of the slack behind them."""
        return self._key_buffer.nbytes + self._value_buffer.nbytes if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """Return the physical entries; the cache knows the logical length."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the physical sizes; the cache knows the offset."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


def _rows(states: Tensor, order: Tensor) -> Tensor:
    """Choose entries ``order`` [B, P'] of ``[B, H, P, D]``; row by row, which is faster than a gather of elements."""
    rows = [row.index_select(1, chosen) for row, chosen in zip(states, order, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


class EntryTable:
    """What is known of each physical entry: logical index, kind, span and position, -1 in holes.

    One int64 tensor ``[4, B, P]``, the front of a larger buffer.
    """

    def __init__(self, buffer: Tensor | None = None) -> None:
        self._buffer = buffer
        self.length = 0 if buffer is None else buffer.shape[2]

    @property
    def fields(self) -> Tensor:
        """``[4, B, P]``: index, kind, span, position."""
        if self._buffer is None:
            return torch.empty(4, 0, 0, dtype=torch.int64)
        return self._buffer[:, :, : self.length]

    def append(self, fields: Tensor) -> None:
        """Add entries ``[4, B, T]``."""
        buffer = fields[:, :, :0] if self._buffer is None else self._buffer
        self._buffer = grown(buffer, self.length, fields, 2)
        self.length += fields.shape[2]
