"""The cache of a landmark-attention model: keys and values of all positions, without rotation.

Positions of a block depend on which blocks are read with it, so keys are rotated where they are used.

Legend: B batch, T tokens, P positions of a call, L positions held, G kv heads, D head size, C positions of a block.
"""

import torch
from torch import Tensor

from models.drt.layout import IndexedLayout
from models.drt.layout_maps import segment_layout
from models.landmark.configuration_landmark import LandmarkConfig
from models.row_cache import RowCache, appended, selected
from models.row_lm import RowCall
from models.rows import Spans


class LandmarkCache(RowCache):
    """All keys and values of a batch of sequences."""

    config: LandmarkConfig

    def clear(self) -> None:
        """Hold nothing."""
        self.layers_held: list[tuple[Tensor, Tensor] | None] = [None] * self.config.num_hidden_layers
        self._seen: list[int] = []
        self._new: list[int] = []

    def begin(self, input_ids: Tensor, call: RowCall) -> tuple[IndexedLayout, Tensor]:
        """Start a call with ids ``[B, T]``.

        Returns:
            Where text and landmarks lie among its positions, and the place of each position in its row ``[B, P]``.
        """
        size = self.config.chunk_size
        layout = segment_layout(input_ids, call.past, Spans([0] * len(call.new), call.new), chunk_size=size)
        after = [past + new for past, new in zip(call.past, call.new, strict=True)]
        self._seen = [past + past // size for past in call.past]
        self._new = [total + total // size - seen for total, seen in zip(after, self._seen, strict=True)]
        first = torch.tensor(self._seen, device=input_ids.device)[:, None]
        return layout, first + torch.arange(layout.num_positions, device=input_ids.device)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, L, G, D]`` with those of the call ``[B, P, G, D]``, and keep them."""
        held = self.layers_held[layer] or (None, None)
        # Columns that fill up the shorter rows of a call come behind all others, where no query looks.
        joined = [appended(old, new, self._seen, self._new) for old, new in zip(held, (key, value), strict=True)]
        self.layers_held[layer] = (joined[0].detach(), joined[1].detach())
        return joined[0], joined[1]

    def select(self, rows: Tensor) -> None:
        """Make row i hold what row ``rows[i]`` held."""
        for layer, held in enumerate(self.layers_held):
            if held is not None:
                key, value = (selected(tensor, rows) for tensor in held)
                assert key is not None and value is not None
                self.layers_held[layer] = (key, value)

    def nbytes(self) -> int:
        """Return the bytes of all keys and values."""
        return sum(tensor.nbytes for held in self.layers_held if held is not None for tensor in held)
