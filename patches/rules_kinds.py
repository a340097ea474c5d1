"""The kinds of columns of a row that holds sentinels, shared by the layout and by the rule that reads it.

Legend: B batch, S columns.
"""

from typing import Protocol

from torch import Tensor

PLAIN, OPEN, SLOT, PAD = 0, 1, 2, -1


class Spans(Protocol):
    """What the sentinel rule reads: a layout, or the entries of a cache."""

    @property
    def kind(self) -> Tensor:
        """``[B, S]``: PLAIN, OPEN, SLOT or PAD."""

    @property
    def span(self) -> Tensor:
        """``[B, S]``: number of the closed span a column belongs to, 0 outside."""
