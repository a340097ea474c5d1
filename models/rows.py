"""Which positions of a batch are text: attention masks, packed documents, and the progress of cached rows.

Legend: B batch, T tokens of this call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Valid tokens of one call: row b holds ``lengths[b]`` of them, from column ``offsets[b]`` on."""

    offsets: list[int]
    lengths: list[int]

    @classmethod
    def full(cls, batch_size: int, length: int) -> "Spans":
        """Every column of every row is valid."""
        return cls([0] * batch_size, [length] * batch_size)

    def shift(self, device: torch.device) -> Tensor | None:
        """Return the offsets ``[B]`` on ``device``, None if all are 0."""
        return torch.tensor(self.offsets, device=device) if any(self.offsets) else None

    def documents(self, input_ids: Tensor) -> Tensor | None:
        """Return 0 at valid tokens and -1 at padding ``[B, T]`` int64, None if there is no padding."""
        if self == Spans.full(*input_ids.shape):
            return None
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = torch.tensor(self.offsets, device=input_ids.device)[:, None]
        count = torch.tensor(self.lengths, device=input_ids.device)[:, None]
        return ((column >= first) & (column < first + count)).long() - 1


@dataclass
class RowProgress:
    """How far each row of a cached batch is; plain integers, so that decoding never waits for the device."""

    seen: int = 0
    """Input positions seen, padding included."""
    lengths: list[int] = field(default_factory=list)
    """Valid tokens seen by each row."""
    ended: list[bool] = field(default_factory=list)
    """True once padding followed the valid tokens of a row."""

    def spans(self, shape: torch.Size, attention_mask: Tensor | None) -> Spans:
        """Return the valid tokens of a call with inputs of ``shape`` [B, T] that continues these rows.

        Raises:
            ValueError: If the mask has another shape than ``[B, seen + T]``, has holes or contradicts earlier calls.
        """
        batch_size, length = shape
        lengths = self.lengths or [0] * batch_size
        ended = self.ended or [False] * batch_size
        if len(lengths) != batch_size:
            raise ValueError(f"the cache holds {len(lengths)} sequences, got inputs for {batch_size}; use a new cache")
        if attention_mask is None:
            if any(ended):
                raise ValueError("attention_mask is missing although earlier calls ended some rows with padding")
            return Spans.full(batch_size, length)
        if attention_mask.shape != (batch_size, self.seen + length):
            raise ValueError(
                f"attention_mask must be {[batch_size, self.seen + length]} (all positions seen so far and the new "
                f"ones), got {list(attention_mask.shape)}"
            )
        started = [count > 0 for count in lengths]
        if self.seen:
            running = [begun and not over for begun, over in zip(started, ended, strict=True)]
            if attention_mask[:, self.seen - 1].bool().tolist() != running:
                raise ValueError("attention_mask contradicts the mask of the earlier calls with this cache")
        return _checked_spans(attention_mask[:, self.seen :], started=started, ended=ended)

    def advance(self, spans: Spans, length: int) -> None:
        """Count a call of ``length`` columns with these valid tokens."""
        before = self.lengths or [0] * len(spans.lengths)
        ended = self.ended or [False] * len(spans.lengths)
        self.lengths = [count + new for count, new in zip(before, spans.lengths, strict=True)]
        stops = [offset + new for offset, new in zip(spans.offsets, spans.lengths, strict=True)]
        self.ended = [
            over or (total > 0 and stop < length) for over, total, stop in zip(ended, self.lengths, stops, strict=True)
        ]
        self.seen += length

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row ``rows[i]`` was."""
        if self.lengths:
            self.lengths = [self.lengths[row] for row in rows]
            self.ended = [self.ended[row] for row in rows]


def _checked_spans(mask: Tensor, *, started: list[bool], ended: list[bool]) -> Spans:
    valid = mask.bool()
    length = valid.shape[1]
    counts = valid.sum(1)
    first = valid.int().argmax(1)
    last = length - 1 - valid.flip(1).int().argmax(1)
    numbers = torch.stack([counts, first, last]).tolist()
    for row, (count, begin, end) in enumerate(zip(*numbers, strict=True)):
        continues = not started[row] or (begin == 0 and not ended[row])
        if count and (end - begin + 1 != count or not continues):
            raise ValueError(
                f"attention_mask must be zeros only at the left and right end of a row, row {row} has a hole"
            )
    counts_list, first_list, _ = numbers
    offsets = [begin if count else 0 for count, begin in zip(counts_list, first_list, strict=True)]
    return Spans(offsets, counts_list)


def document_numbers(document_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Number the packed documents of each row 0, 1, ...; a new one begins where the value changes.

    Args:
        document_ids: Any integers, ``[B, T]``.
        attention_mask: ``[B, T]``, 0 = padding, or None.

    Returns:
        Non-decreasing numbers ``[B, T]`` int64, -1 at padding.
    """
    changes = torch.zeros_like(document_ids, dtype=torch.long)
    changes[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).long()
    numbers = changes.cumsum(1)
    return numbers if attention_mask is None else numbers.masked_fill(~attention_mask.bool(), -1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[b, index[b, ...]]``: ``[B, L, ...]`` by ``[B, ...]`` int64."""
    batch_size, length = x.shape[:2]
    base = torch.arange(batch_size, device=x.device).mul_(length)
    flat = index + base.view(-1, *[1] * (index.dim() - 1))
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def align(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Move column ``offsets[b]`` of ``[B, T, ...]`` to column 0; what comes behind the last column is arbitrary."""
    if offsets is None:
        return x
    column = torch.arange(x.shape[1], device=x.device)
    return take(x, (column + offsets[:, None]).clamp_max(x.shape[1] - 1))


def restore(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Undo ``align``; what comes before column ``offsets[b]`` is arbitrary."""
    if offsets is None:
        return x
    column = torch.arange(x.shape[1], device=x.device)
    return take(x, (column - offsets[:, None]).clamp_min(0))
