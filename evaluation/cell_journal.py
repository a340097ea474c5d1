"""The measured batches of one cell on disk: a line for each, appended as it is done.

Notable: processes need no other meeting point than these files. Whoever holds the lock of a cell computes what is
missing of it; a process that is killed lets go of the lock, and at most the line it was writing is lost.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CellJournal:
    """Lines of a cell, in the order of its batches.

    Args:
        path: its file; made with the first lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self, *, wait: bool) -> Iterator[bool]:
        """Hold the cell; yields False, if not to ``wait``, where another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def lines(self) -> list[dict[str, Any]]:
        """Return the whole lines; a torn one at the end is not one."""
        return [json.loads(line) for line in self._whole()]

    def mend(self) -> None:
        """Cut a torn line off; the caller holds the cell."""
        size = sum(map(len, self._whole()))
        if self.path.stat().st_size != size:
            os.truncate(self.path, size)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line and flush it to the disk; the caller holds the cell."""
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole(self) -> list[bytes]:
        """Lines with their ends, up to the first that is torn or no JSON."""
        whole = []
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else ():
            try:
                json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            whole.append(line)
        return whole
