"""Rows with sentinels: which column is what, where it stands, what it predicts, and what of it must be kept.

Legend: B batch, T original (plain) tokens of a row, S columns of a row after insertion, K slots of a span.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patches.rules_kinds import OPEN, PAD, PLAIN, SLOT, last_seen
from patches.sentinel.layout_parts import Span, parse_ids, place_row
from patches.sentinel.sentinels import Sentinels

IGNORED = -100


@dataclass(frozen=True, eq=False)
class SpanLayout:
    """Token rows with spans bracketed by sentinels. Everything else is derived from the three tensors.

    A span is its opening sentinel, its tokens and its slots, under one number; spans are numbered in order of closing.
    """

    input_ids: Tensor
    """``[B, S]`` int64."""
    kind: Tensor
    """``[B, S]`` int8: PLAIN, OPEN, SLOT or PAD."""
    span: Tensor
    """``[B, S]`` int32: 1, 2, ... inside closed spans, else 0."""
    forget: Tensor | None = None
    """``[B]`` int32: thousandths of the closed spans, oldest first, whose slots are gone; None = none of them."""

    def __post_init__(self) -> None:
        shapes = {tuple(tensor.shape) for tensor in (self.input_ids, self.kind, self.span)}
        if len(shapes) != 1 or self.input_ids.dim() != 2:
            raise ValueError(f"input_ids, kind and span must share one shape [B, S], got {sorted(shapes)}")
        for name, dtype in (("input_ids", torch.int64), ("kind", torch.int8), ("span", torch.int32)):
            object.__setattr__(self, name, getattr(self, name).to(dtype))
        if self.forget is not None:
            object.__setattr__(self, "forget", self.forget.to(torch.int32).expand(self.input_ids.shape[0]))

    @classmethod
    def from_spans(
        cls,
        input_ids: Sequence[Sequence[int] | Tensor] | Tensor,
        spans: Sequence[Sequence[Span]],
        sentinels: Sentinels,
        *,
        pad_id: int = 0,
        forget: int | Sequence[int] | None = None,
    ) -> "SpanLayout":
        """Bracket spans of original tokens: ``open_id`` before each, the slot ids after it; pad on the right.

        Args:
            input_ids: Ragged rows of original token ids, ``[T]`` each.
            spans: For each row half-open ranges ``(start, end)`` of original indices, in any order. A third number,
                ``close``, puts all sentinels of the span before the token of that index instead; until then the
                tokens of the span stay visible.
            sentinels: Ids to insert.
            pad_id: Id of padding.
            forget: Thousandths of the closed spans, oldest first, whose slots are gone: one number, or one for each
                row.

        Raises:
            ValueError: if spans overlap, are empty, leave their row, or close before they end or in another order than
                they start, or if the rows do not match.
        """
        if len(input_ids) != len(spans):
            raise ValueError(f"got {len(input_ids)} rows of tokens but spans of {len(spans)} rows")
        rows = [place_row(torch.as_tensor(ids), row, sentinels) for ids, row in zip(input_ids, spans, strict=True)]
        fills = (pad_id, PAD, 0)
        padded = [
            torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
            for parts, fill in zip(zip(*rows, strict=True), fills, strict=True)
        ]
        ids, kind, span = padded
        return cls(ids, kind, span, None if forget is None else torch.as_tensor(forget).reshape(-1))

    @classmethod
    def from_ids(cls, input_ids: Tensor, sentinels: Sentinels, *, attention_mask: Tensor | None = None) -> "SpanLayout":
        """Parse rows that hold sentinels already, cut anywhere.

        A run of slots closes the span opened last; a run that is the first sentinel of its row closes a span that
        began before the row; an opening sentinel without slots leaves its tokens ordinary.

        Args:
            input_ids: ``[B, S]``.
            sentinels: Ids to look for.
            attention_mask: ``[B, S]``, 0 at padding on either side; None = no padding.

        Raises:
            ValueError: on an opening sentinel inside a span, or a later run of slots that closes none.
        """
        return cls(input_ids, *parse_ids(input_ids, sentinels, attention_mask))

    @cached_property
    def position_ids(self) -> Tensor:
        """``[B, S]`` int64: plain tokens count from 0, pads 0.

        A sentinel copies the plain token before it: an opening one that before its span, a slot the last of its span.
        """
        plain, span = self.kind == PLAIN, self.span.long()
        position = (plain.cumsum(1) - 1).clamp(min=0).masked_fill(self.kind == PAD, 0)
        if not bool((span > 0).any()):
            return position
        last = position.new_full((span.shape[0], int(span.max()) + 1), -1)
        last = last.scatter_reduce(1, span, torch.where(plain, position, -1), "amax")
        first = torch.full_like(last, plain.shape[1])
        first = first.scatter_reduce(1, span, torch.where(plain, position, plain.shape[1]), "amin")
        before = torch.where(self.kind == OPEN, (first.gather(1, span) - 1).clamp(min=0), last.gather(1, span))
        filled = (span > 0) & (last.gather(1, span) >= 0) & ((self.kind == OPEN) | (self.kind == SLOT))
        return torch.where(filled, before, position)

    @cached_property
    def plain_index(self) -> Tensor:
        """``[B, T]`` int64: column of each original token, -1 after the last."""
        plain = self.kind == PLAIN
        order = torch.argsort((~plain).to(torch.int8), dim=1, stable=True)[:, : int(plain.sum(1).max())]
        inside = torch.arange(order.shape[1], device=order.device) < plain.sum(1, keepdim=True)
        return torch.where(inside, order, -1)

    @cached_property
    def labels(self) -> Tensor:
        """``[B, S]`` int64: logits at t are scored against index t + 1, the next plain token; -100 = ignored."""
        after = self.plain_index[:, 1:]
        targets = self.input_ids.gather(1, after.clamp(min=0))
        # One column more catches what must not be written.
        column = torch.where(after < 0, self.input_ids.shape[1], self.plain_index[:, :-1] + 1)
        labels = torch.full_like(torch.nn.functional.pad(self.input_ids, (0, 1)), IGNORED)
        return labels.scatter(1, column, targets)[:, :-1]

    @cached_property
    def published_labels(self) -> Tensor:
        """``[B, S]`` int64: as `labels`, but skipping one sentinel only, so that the target may be a sentinel."""
        ids, kind = (torch.nn.functional.pad(x, (0, 1), value=PAD) for x in (self.input_ids, self.kind))
        sentinel_next = (kind[:, 1:-1] == OPEN) | (kind[:, 1:-1] == SLOT)
        target = torch.where(sentinel_next, ids[:, 2:], ids[:, 1:-1])
        target_kind = torch.where(sentinel_next, kind[:, 2:], kind[:, 1:-1])
        scored = (kind[:, :-2] == PLAIN) & (target_kind != PAD)
        return torch.nn.functional.pad(torch.where(scored, target, IGNORED), (1, 0), value=IGNORED)

    @cached_property
    def num_tokens(self) -> Tensor:
        """``[B]`` int64: original tokens."""
        return (self.kind == PLAIN).sum(1)

    @cached_property
    def num_kept(self) -> Tensor:
        """``[B]`` int64: entries that a query after the row may see."""
        return self.needed(self.kind.shape[1] - 1).sum(1)

    @property
    def achieved_ratio(self) -> Tensor:
        """``[B]`` float64: fraction removed, ``1 - num_kept / num_tokens``."""
        return 1 - self.num_kept.double() / self.num_tokens.clamp(min=1)

    @cached_property
    def _last_seen(self) -> Tensor:
        return last_seen(self)

    @cached_property
    def _last_column(self) -> Tensor:
        """``[B, S]``: last column of the span of each column; columns outside spans are their own."""
        column = torch.arange(self.span.shape[1], device=self.span.device).expand_as(self.span)
        span = self.span.long()
        last = column.new_zeros(span.shape[0], int(span.max()) + 1 if span.numel() else 1)
        last = last.scatter_reduce(1, span, column, "amax")
        return torch.where(span > 0, last.gather(1, span), column)

    def needed(self, column: int) -> Tensor:
        """Return bool ``[B, S]``: entries up to `column`, itself included, that a later query may still see.

        Slots stay until they are forgotten, plain tokens until their span is closed, an opening sentinel likewise.
        """
        fed = torch.arange(self.kind.shape[1], device=self.kind.device) <= column
        live = ((self.kind == PLAIN) | (self.kind == SLOT)) & (self._last_seen > column)
        waiting = (self.kind == OPEN) & (self._last_column > column)
        unused = (self.kind == SLOT) & (self._last_column > column)
        return fed & (live | waiting | unused)

    def to(self, device: torch.device | str) -> "SpanLayout":
        """Return the layout on a device."""
        forget = None if self.forget is None else self.forget.to(device)
        return SpanLayout(self.input_ids.to(device), self.kind.to(device), self.span.to(device), forget)
