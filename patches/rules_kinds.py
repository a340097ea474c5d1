"""The kinds of columns of a row that holds sentinels, shared by the layout and by the rule that reads it.

Legend: B batch, S columns.
"""

from typing import Protocol

import torch
from torch import Tensor

PLAIN, OPEN, SLOT, PAD = 0, 1, 2, -1


class Spans(Protocol):
    """What the sentinel rule reads: a layout, or the entries of a cache."""

    @property
    def kind(self) -> Tensor:
        """``[B, S]``: PLAIN, OPEN, SLOT or PAD."""

    @property
    def span(self) -> Tensor:
        """``[B, S]``: number of the closed span a column belongs to, in order of closing, 0 outside."""


def last_seen(spans: Spans) -> Tensor:
    """Return ``[B, S]``: the last column whose queries may see each entry, S where there is no end.

    A token of a span is seen until the last slot of its span has come; a slot for ever, unless the spans have
    ``forget`` ``[B]``: thousandths of the closed spans, oldest first, whose slots are gone.
    """
    kind, span = spans.kind, spans.span.long().clamp(min=0)
    size = kind.shape[1]
    if not size:
        return span
    column, slot = torch.arange(size, device=kind.device).expand_as(span), kind == SLOT
    closing = span.new_full((span.shape[0], int(span.max()) + 1), -1)
    closing = closing.scatter_reduce(1, span, torch.where(slot, column, -1), "amax").gather(1, span)
    end = torch.where((span > 0) & (closing >= 0) & ~slot, closing, size)
    forget: Tensor | None = getattr(spans, "forget", None)
    if forget is None:
        return end
    closed = torch.where(slot, span, 0).cummax(1).values
    gone = closed * forget.long()[:, None] // 1000
    first_without = torch.searchsorted(gone, span.contiguous())
    return torch.where(slot & (first_without < size), first_without - 1, end)
