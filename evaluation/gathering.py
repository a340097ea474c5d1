"""Processes of one launch that put their results together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from evaluation.processes import Process

# The others may compute for long; one that dies takes the whole launch with it, so nobody waits for ever.
PATIENCE = timedelta(days=30)


@contextmanager
def joined(process: Process) -> Iterator[None]:
    """Join the processes of a launch for a while, over gloo; a process alone, or one that has joined, does nothing."""
    if process.world_size == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(value: Any, process: Process) -> list[Any]:
    """Return the picklable values of all processes by rank, on all of them; they must have joined."""
    if process.world_size == 1:
        return [value]
    found: list[Any] = [None] * process.world_size
    dist.all_gather_object(found, value)
    return found


def share_of(missing: Sequence[Any], process: Process) -> list[Any]:
    """Return this process's share of what the first one found missing; they must have joined.

    What is missing is asked of one process alone: the others may look at the files a moment later.
    """
    return list(gather(list(missing), process)[0][process.rank :: process.world_size])
