"""Builders of layouts: for calls without a cache, for packed documents, and for the continuation of a cache.

Legend: B batch, T text tokens, P positions, S text tokens of a chunk, C = S + 1, R complete chunks, G query groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.drt.layout import GridLayout, IndexedLayout, Layout
from models.rows import RowProgress, Spans, document_numbers


def plain_layout(
    input_ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, *, chunk_size: int
) -> tuple[Layout, Tensor | None]:
    """Lay out a call without a cache.

    Returns:
        The layout and the document of every token ``[B, T]`` (-1 = padding), None if all are in one document.
    """
    if attention_mask is None and document_ids is None:
        return GridLayout(input_ids.shape[1], chunk_size), None
    spans = RowProgress().spans(input_ids.shape, attention_mask)
    if document_ids is not None:
        documents = document_numbers(document_ids, attention_mask)
        return packed_layout(documents, chunk_size), documents
    return grid_layout(input_ids, spans, chunk_size), spans.documents(input_ids)


def grid_layout(input_ids: Tensor, spans: Spans, chunk_size: int) -> GridLayout:
    """Lay out rows of ``[B, T]`` that begin with their first valid token."""
    layout = GridLayout(input_ids.shape[1], chunk_size, offsets=spans.shift(input_ids.device))
    layout.row_chunks = [count // chunk_size for count in spans.lengths]
    return layout


def packed_layout(documents: Tensor, chunk_size: int) -> IndexedLayout:
    """Lay out packed documents, each with its own chunks, without waiting for the device.

    All documents' complete chunks of a row are numbered through; group r holds the positions between the landmark of
    chunk r and the next landmark or the end of its document.

    Args:
        documents: Non-decreasing document numbers ``[B, T]``, -1 = padding.
        chunk_size: S.
    """
    batch_size, length = documents.shape
    device, valid = documents.device, documents >= 0
    max_chunks = max(1, length // chunk_size)
    num_positions = length + length // chunk_size
    column = torch.arange(length, device=device)
    starts = torch.ones_like(valid)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, column, 0).cummax(1).values
    completes = ((column - first) % chunk_size == chunk_size - 1) & valid
    rank = valid.long().cumsum(1) - 1
    chunk_after = completes.long().cumsum(1)
    text_map = torch.where(valid, rank + chunk_after - completes.long(), 0)

    # A cell past the end catches what padding would write.
    def scattered(size: int, where: Tensor, index: Tensor, value: Tensor, fill: int) -> Tensor:
        target = torch.full((batch_size, size + 1), fill, device=device)
        return target.scatter_(1, torch.where(where, index, size), value.expand_as(index))[:, :size]

    insert_map = scattered(num_positions, valid, text_map, column, -1)
    position_ids = scattered(num_positions, valid, text_map, documents, -1)
    position_ids = torch.maximum(position_ids, scattered(num_positions, completes, text_map + 1, documents, -1))
    landmark = scattered(max_chunks, completes, chunk_after - 1, text_map + 1, -1)
    # Absent chunks belong to a document behind all others, which keeps the owners sorted.
    owner = scattered(max_chunks, completes, chunk_after - 1, documents, length).contiguous()
    number = torch.arange(max_chunks, device=device).expand_as(owner)
    first_chunk = torch.searchsorted(owner, owner)
    visible = torch.stack([first_chunk, number], dim=2).masked_fill((landmark < 0)[..., None], 0)

    cells = torch.arange(chunk_size + 1, device=device)
    chunk_map = (landmark[..., None] - chunk_size + cells).clamp(0, num_positions - 1)
    group_map = (landmark[..., None] + 1 + cells).clamp(0, num_positions - 1)
    group, cell = _following_chunk(position_ids, landmark, owner)
    return IndexedLayout(
        num_chunks=max_chunks,
        visible=visible,
        document_ids=position_ids,
        retrieves=True,
        insert_map=insert_map.clamp_min(0),
        is_landmark=insert_map < 0,
        text_map=text_map,
        chunk_map=chunk_map,
        group_map=group_map,
        join_map=(group * (chunk_size + 1) + cell).clamp(0, max_chunks * (chunk_size + 1) - 1),
        has_group=group >= 0,
    )


def _following_chunk(position_ids: Tensor, landmark: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each position ``[B, P]`` the last chunk its document completed (-1 = none) and the cell behind it."""
    position = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids).contiguous()
    # Absent chunks sort behind everything.
    ends = torch.where(landmark < 0, position_ids.shape[1], landmark).contiguous()
    group = torch.searchsorted(ends, position) - 1
    safe = group.clamp_min(0)
    same = (group >= 0) & (owner.gather(1, safe) == position_ids)
    return torch.where(same, group, -1), position - ends.gather(1, safe) - 1


class _SegmentRows:
    """Host-side counts of a call that continues rows of ``past`` text tokens with ``lengths`` new ones."""

    def __init__(self, past: Sequence[int], lengths: Sequence[int], chunk_size: int) -> None:
        size = chunk_size + 1
        after = [before + count for before, count in zip(past, lengths, strict=True)]
        self.done = [before // chunk_size for before in past]
        """Chunks complete before the call."""
        self.chunks = [total // chunk_size - done for total, done in zip(after, self.done, strict=True)]
        """Chunks completed by the call."""
        self.seen = [before + done for before, done in zip(past, self.done, strict=True)]
        """Positions before the call."""
        self.new = [count + chunks for count, chunks in zip(lengths, self.chunks, strict=True)]
        """Positions of the call."""
        self.touched = [(seen % size + new - 1) // size + 1 for seen, new in zip(self.seen, self.new, strict=True)]
        """Chunks that positions of the call lie in."""


def segment_layout(input_ids: Tensor, past: Sequence[int], spans: Spans, *, chunk_size: int) -> IndexedLayout:
    """Lay out the continuation of cached rows.

    Positions of a row follow on those it has; rows that advance less end with cells that hold nothing. The running
    chunk's earlier tokens come in front of the positions (``num_pending`` = S cells) wherever chunks are gathered.

    Args:
        input_ids: New tokens ``[B, T]``.
        past: Valid text tokens each row has seen.
        spans: Valid new tokens.
        chunk_size: S.
    """
    size, device = chunk_size + 1, input_ids.device
    rows = _SegmentRows(past, spans.lengths, chunk_size)
    num_chunks, num_positions = max(rows.chunks), max(1, *rows.new)
    table = torch.tensor([rows.seen, rows.new, rows.done, rows.chunks, spans.offsets, list(past)], device=device)
    seen, new, done, chunks, offset, before = table[:, :, None].unbind()
    position = torch.arange(num_positions, device=device)
    token = seen + position - (seen + position) // size - before
    is_text = ((seen + position) % size != chunk_size) & (position < new)
    text = before + torch.arange(input_ids.shape[1], device=device) - offset
    number = torch.arange(num_chunks, device=device)
    own = torch.where(number < chunks, done + number, 0)
    cells = torch.arange(size, device=device)
    behind = number[:, None] * size + cells - (seen % size)[..., None]
    num_groups = max(1, *rows.touched)
    # One group needs no grid: its rows are the positions themselves.
    width = size if num_groups > 1 else num_positions
    start = seen % size if num_groups > 1 else torch.zeros_like(seen)
    groups = torch.arange(num_groups * width, device=device) - start
    return IndexedLayout(
        num_chunks=num_chunks,
        visible=torch.stack([torch.zeros_like(own), own], dim=2),
        document_ids=None,
        retrieves=num_groups > 1,
        insert_map=(token + offset).clamp(0, input_ids.shape[1] - 1),
        is_landmark=~is_text,
        text_map=(text + text // chunk_size - seen).clamp(0, num_positions - 1),
        chunk_map=torch.where(behind < 0, cells, chunk_size + behind).clamp_max(chunk_size + num_positions - 1),
        group_map=groups.clamp(0, num_positions - 1).unflatten(1, (num_groups, width)),
        join_map=(start + position).clamp_max(num_groups * width - 1),
        has_group=None,
        num_pending=chunk_size,
        row_chunks=rows.chunks,
    )
