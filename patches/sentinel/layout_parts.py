"""How a layout comes about: placing spans in a row of tokens, and reading them from rows of ids.

Legend: B batch, T original tokens of a row, S columns of a row, N spans of a row, K slots of a span.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from patches.rules_kinds import OPEN, PAD, PLAIN, SLOT
from patches.sentinel.sentinels import Sentinels

Span = tuple[int, ...] | list[int]
"""Half-open range of original indices; a third number says before which token it is closed, else at its end."""


def place_row(ids: Tensor, spans: Sequence[Span], sentinels: Sentinels) -> tuple[Tensor, Tensor, Tensor]:
    """Insert sentinels around the spans of one row ``[T]``; returns ids, kind and span ``[S]``.

    Raises:
        ValueError: if spans overlap, are empty, leave the row, or close before their end or out of order.
    """
    if ids.dim() != 1:
        raise ValueError(f"each row must be one-dimensional, got shape {list(ids.shape)}")
    ids, bounds = ids.cpu().long(), _sorted_bounds(spans, ids.shape[0])
    starts, ends, closes = bounds.T.contiguous()
    slots, number = sentinels.slots, torch.arange(starts.shape[0])
    token = torch.arange(ids.shape[0])
    opened = torch.searchsorted(starts, token, right=True)
    closed = torch.searchsorted(ends, token, right=True)
    # A span that is closed late is opened then, too: nobody but its slots sees the opening sentinel.
    opens = torch.where(closes > ends, closes, starts)

    def column_of(index: Tensor) -> Tensor:
        """The column of the original token of an index: behind all sentinels that stand before it."""
        opens_before = torch.searchsorted(opens.sort().values, index, right=True)
        return index + opens_before + slots * torch.searchsorted(closes, index, right=True)

    plain_column = column_of(token)
    earlier = (opens < closes[:, None]) | ((opens == closes[:, None]) & (number <= number[:, None]))
    slot_column = (closes + earlier.sum(1) + slots * number)[:, None] + torch.arange(slots)
    open_column = torch.where(closes > ends, slot_column[:, 0], column_of(starts)) - 1
    size = ids.shape[0] + (1 + slots) * starts.shape[0]
    row, kind, span = (torch.zeros(size, dtype=torch.long) for _ in range(3))
    row[plain_column], kind[plain_column] = ids, PLAIN
    row[open_column], kind[open_column] = sentinels.open_id, OPEN
    row[slot_column], kind[slot_column] = torch.tensor(sentinels.slot_ids), SLOT
    span[plain_column] = torch.where(opened > closed, opened, 0)
    span[open_column] = number + 1
    span[slot_column] = (number + 1)[:, None]
    return row, kind, span


def _sorted_bounds(spans: Sequence[Span], num_tokens: int) -> Tensor:
    """Return sorted, checked starts, ends and closes ``[N, 3]``."""
    ordered = sorted((int(span[0]), int(span[1]), int(span[-1])) for span in spans)
    previous = closed = 0
    for start, end, close in ordered:
        if start >= end or start < 0 or end > num_tokens:
            raise ValueError(f"span ({start}, {end}) is empty or leaves its row of {num_tokens} tokens")
        if start < previous:
            raise ValueError(f"span ({start}, {end}) overlaps the span that ends at {previous}")
        if not max(end, closed) <= close <= num_tokens:
            raise ValueError(
                f"span ({start}, {end}) closes at {close}: a span closes at its end or later, not before the spans "
                f"in front of it, and inside its row of {num_tokens} tokens"
            )
        previous, closed = end, close
    return torch.tensor(ordered, dtype=torch.long).reshape(-1, 3)


def parse_ids(input_ids: Tensor, sentinels: Sentinels, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find the spans of rows ``[B, S]`` that hold sentinels; returns kind and span.

    Raises:
        ValueError: on an opening sentinel inside a span, a run of slots that closes none, or one that is too long.
    """
    opening = input_ids == sentinels.open_id
    slot = torch.isin(input_ids, torch.tensor(sentinels.slot_ids, device=input_ids.device))
    pad = torch.zeros_like(slot) if attention_mask is None else attention_mask == 0
    opening, slot = opening & ~pad, slot & ~pad
    run = slot & ~torch.nn.functional.pad(slot, (1, -1))
    opened, closed = opening.cumsum(1), run.cumsum(1)
    # A row whose first sentinel is a slot starts inside a span.
    inside_first = ((closed > 0) & (opened == 0)).any(1, keepdim=True).long()
    depth = inside_first + opened - closed
    _check_order(depth, slot, run, sentinels.slots)
    kind = torch.where(opening, OPEN, torch.where(slot, SLOT, torch.where(pad, PAD, PLAIN)))
    # A span is numbered by the run that closes it; the last one may have none.
    number = torch.where(slot, closed, torch.where(depth > 0, closed + 1, 0))
    return kind, number.masked_fill((number > closed[:, -1:]) | pad, 0)


def _check_order(depth: Tensor, slot: Tensor, run: Tensor, slots: int) -> None:
    """Refuse rows whose sentinels do not alternate."""
    for wrong, what in ((depth > 1, "an opening sentinel inside a span"), (depth < 0, "slots that close no span")):
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(f"row {row} has {what} at column {column}; check the ids, or cut rows elsewhere")
    column = torch.arange(slot.shape[1], device=slot.device).expand_as(run)
    first = torch.where(run, column, 0).cummax(1).values
    if bool((slot & (column - first >= slots)).any()):
        raise ValueError(f"more than {slots} slots in a row; check the ids, each span has {slots}")
