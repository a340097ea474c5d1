"""Chunk keys and values of a cached sequence, on the device or in pinned host memory.

Chunks are only ever appended, so the store is a list of exactly filled blocks; neighbouring small blocks are merged the
way a binary counter carries, which keeps the list short without reserving memory. Reading gathers the chunks that are
asked for, each once per row, and with offload moves them to the device in one copy beside the computation.

Legend: B batch, R chunks of a call, K retrieved chunks, F fetched chunks, S text tokens of a chunk, G chunk key/value
heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Merging copies; beyond these sizes the copies cost more than the longer list.
_DEVICE_BLOCK = 4096
_HOST_BLOCK = 256


@dataclass
class Block:
    """Consecutive chunks of all rows."""

    data: Tensor
    """Keys and values ``[B, n, 2, S, G, D]``."""
    rows: list[int]
    """Where each row of the batch lies in ``data``; beam search permutes this list instead of the data."""

    def own(self) -> Tensor:
        """Return data in the order of the batch, for writing."""
        identity = list(range(len(self.rows)))
        if self.rows != identity or len(identity) != len(self.data):
            self.data, self.rows = self.data[self.rows], identity
        return self.data


@dataclass(frozen=True)
class Fetched:
    """Chunks read from the store."""

    data: Tensor
    """``[B, F, 2, S, G, D]`` on the device; chunks beyond a row's own are arbitrary."""
    local: Tensor
    """``[B, R, K]`` int32, index into F, -1 = empty."""
    ready: torch.cuda.Event | None
    """Wait for it before reading ``data``."""

    def wait(self) -> None:
        """Make the current stream wait until the data has arrived."""
        if self.ready is not None:
            self.ready.wait()


class ChunkStore:
    """Append-only chunks ``[B, E, ...]``; rows may hold different numbers of them."""

    def __init__(self, *, offload: bool) -> None:
        self.offload = offload
        self.blocks: list[Block] = []
        self.fetch_count = 0
        self._stream: torch.cuda.Stream | None = None
        self._written: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return sum(block.data.shape[1] for block in self.blocks)

    def append(self, data: Tensor, done: Sequence[int], new: Sequence[int]) -> None:
        """Store ``new[b]`` chunks of row b of ``data`` [B, R, 2, S, G, D] behind its ``done[b]`` ones."""
        size = len(self)
        if all(count == size for count in done) and len(set(new)) == 1:
            block = data[:, : new[0]]
            self.blocks.append(Block(self._to_store(block), list(range(len(new)))))
        else:
            needed = max(before + count for before, count in zip(done, new, strict=True))
            if needed > size:
                missing = self._empty((data.shape[0], needed - size, *data.shape[2:]), data)
                self.blocks.append(Block(missing.zero_(), list(range(len(new)))))
            for row, (before, count) in enumerate(zip(done, new, strict=True)):
                self._write(row, before, data[row, :count])
        self._merge()

    def _write(self, row: int, number: int, data: Tensor) -> None:
        start = 0
        for block in self.blocks:
            stop = start + block.data.shape[1]
            low, high = max(start, number), min(stop, number + len(data))
            if low < high:
                self._wait_written()
                block.own()[row, low - start : high - start] = data[low - number : high - number].to(block.data.device)
            start = stop

    def _merge(self) -> None:
        limit = _HOST_BLOCK if self.offload else _DEVICE_BLOCK
        while len(self.blocks) > 1:
            left, right = self.blocks[-2:]
            total = left.data.shape[1] + right.data.shape[1]
            if right.data.shape[1] < left.data.shape[1] or total > limit:
                return
            self._wait_written()
            parts = [left.own(), right.own()]
            merged = self._empty((len(left.rows), total, *left.data.shape[2:]), left.data)
            torch.cat(parts, dim=1, out=merged)
            self.blocks[-2:] = [Block(merged, left.rows)]

    def fetch(self, indices: Tensor) -> Fetched:
        """Read the chunks ``[B, R, K]`` int32 (-1 = none) that any slot asks for, each once per row."""
        device = indices.device
        plan, local = _plan(indices.cpu())
        self._wait_written()
        template = self.blocks[0].data
        width = max(len(numbers) for numbers in plan)
        staging = self._empty((len(plan), max(1, width), *template.shape[2:]), template)
        row = torch.cat([torch.full_like(numbers, index) for index, numbers in enumerate(plan)])
        column = torch.cat([torch.arange(len(numbers)) for numbers in plan])
        number = torch.cat(plan)
        start = 0
        for block in self.blocks:
            stop = start + block.data.shape[1]
            here = ((number >= start) & (number < stop)).nonzero().squeeze(1)
            if len(here):
                target, source = row[here], torch.tensor(block.rows)[row[here]]
                places = [index.to(template.device) for index in (target, column[here], source, number[here] - start)]
                staging[places[0], places[1]] = block.data[places[2], places[3]]
            start = stop
        data, ready = self._to_device(staging, device)
        self.fetch_count += self.offload
        return Fetched(data, local.to(device), ready)

    def select(self, rows: Sequence[int]) -> None:
        """Make row i hold what row ``rows[i]`` held."""
        for block in self.blocks:
            block.rows = [block.rows[row] for row in rows]

    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.data.nbytes for block in self.blocks)

    def _empty(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        if self.offload:
            return torch.empty(size, dtype=like.dtype, pin_memory=torch.cuda.is_available())
        return like.new_empty(size)

    def _to_store(self, data: Tensor) -> Tensor:
        if not self.offload:
            return data.contiguous()
        host = self._empty(tuple(data.shape), data)
        if data.is_cuda:
            stream = self._side_stream(data.device)
            with torch.cuda.stream(stream):
                host.copy_(data, non_blocking=True)
                self._written = stream.record_event()
            data.record_stream(stream)
        else:
            host.copy_(data)
        return host

    def _to_device(self, staging: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        if staging.device == device:
            return staging, None
        data = torch.empty_like(staging, device=device)
        stream = self._side_stream(device)
        with torch.cuda.stream(stream):
            data.copy_(staging, non_blocking=True)
            ready = stream.record_event()
        data.record_stream(stream)
        return data, ready

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream

    def _wait_written(self) -> None:
        """Wait until host blocks hold what was sent to them; the host is about to read them."""
        if self._written is not None:
            self._written.synchronize()
            self._written = None


def _plan(indices: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return per row the sorted chunk numbers asked for, and ``indices`` [B, R, K] in terms of those lists."""
    plan, local = [], torch.full_like(indices, -1)
    for row, wanted in enumerate(indices):
        numbers, inverse = torch.unique(wanted[wanted >= 0].long(), return_inverse=True)
        local[row][wanted >= 0] = inverse.to(local.dtype)
        plan.append(numbers)
    return plan, local
