"""Keys and values of the last ``window_size - 1`` positions of every layer, in buffers of fixed size.

Rows of a batch may advance by different numbers of positions (left-padded prompts complete their chunks at different
calls), so the buffers are right aligned: the last column is the last position a row has seen, whatever its number.

Legend: B batch, W window, L cached columns in use, U new columns of a call, G kv heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class WindowRing:
    """Key/value buffers ``[B, W - 1, G, D]`` per layer, allocated at the first call and never enlarged."""

    def __init__(self, num_layers: int, window_size: int) -> None:
        self.capacity = window_size - 1
        self.buffers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._columns = 0
        self._tail: Tensor | None = None

    def begin(self, filled: Sequence[int], new: Sequence[int], *, width: int, device: torch.device) -> Tensor | None:
        """Prepare one call in which row b appends ``new[b]`` of ``width`` columns to ``filled[b]`` seen positions.

        Returns:
            Ids of the ``L + width`` keys the call will attend to, ``[B, L + width]`` (0 real, -1 absent), or None if
            all of them are real in every row.
        """
        held = [min(count, self.capacity) for count in filled]
        self._columns = max(held)
        self._tail = None
        if min(held) == self._columns and min(new) == width:
            return None
        column = torch.arange(self._columns + width, device=device)
        first = torch.tensor([self._columns - count for count in held], device=device)
        last = torch.tensor([self._columns + count for count in new], device=device)
        if min(new) != width:
            shift = last - self.capacity
            self._tail = (shift[:, None] + torch.arange(self.capacity, device=device)).clamp_min(0)
        real = (column >= first[:, None]) & (column < last[:, None])
        return real.long() - 1

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return cached and new keys and values ``[B, L + U, G, D]`` and keep the last ``W - 1`` of each row."""
        if self.buffers[layer] is None:
            size = (key.shape[0], self.capacity, *key.shape[2:])
            self.buffers[layer] = (key.new_zeros(size), value.new_zeros(size))
        kept_key, kept_value = self.buffers[layer]  # type: ignore[misc]
        return self._push(kept_key, key), self._push(kept_value, value)

    def _push(self, kept: Tensor, new: Tensor) -> Tensor:
        joined = torch.cat([kept[:, self.capacity - self._columns :], new], dim=1) if self._columns else new
        if self._tail is not None:
            rows = torch.arange(new.shape[0], device=new.device)[:, None]
            kept.copy_(joined.detach()[rows, self._tail])
        elif self.capacity:
            tail = joined.detach()[:, -self.capacity :]
            kept[:, self.capacity - tail.shape[1] :] = tail
        return joined

    def select(self, rows: Tensor) -> None:
        """Make row i hold what row ``rows[i]`` held; ``rows`` ``[B]`` may lie on any device."""
        for layer, pair in enumerate(self.buffers):
            if pair is not None:
                here = rows.to(pair[0].device)
                self.buffers[layer] = (pair[0].index_select(0, here), pair[1].index_select(0, here))

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for pair in self.buffers if pair is not None for tensor in pair)
