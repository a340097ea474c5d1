"""The cache of a block-recurrent transformer: the last W keys and values of each layer and the states; constant size.

Legend: B batch, W block width, G kv heads, D head size, Z state vectors, M model width.
"""

from typing import NamedTuple

from torch import Tensor

from models.block_recurrent.configuration_block_recurrent import BlockRecurrentConfig
from models.row_cache import RowCache, selected


class LayerMemory(NamedTuple):
    """What a layer hands from step to step."""

    keys: Tensor | None = None
    """``[B, W, G, D]``, the last column is the last token; None before the first step."""
    values: Tensor | None = None
    """As ``keys``."""
    state: Tensor | None = None
    """``[B, Z, M]`` in recurrent layers."""

    def detached(self) -> "LayerMemory":
        """Return it without its history."""
        return LayerMemory(*(None if tensor is None else tensor.detach() for tensor in self))


class BlockRecurrentCache(RowCache):
    """State of a batch of sequences."""

    config: BlockRecurrentConfig

    def clear(self) -> None:
        """Hold nothing."""
        self.memory: list[LayerMemory] = []

    def select(self, rows: Tensor) -> None:
        """Make row i hold what row ``rows[i]`` held."""
        self.memory = [LayerMemory(*(selected(tensor, rows) for tensor in layer)) for layer in self.memory]

    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(tensor.nbytes for layer in self.memory for tensor in layer if tensor is not None)
