"""What the processes of an evaluation have finished: lines of JSON in a file for each process, read by all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class RankJournal:
    """Values that survive a kill.

    Args:
        folder: where the files lie; made with the first line.
        rank: of this process, which appends to its own file.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank

    def read(self) -> Iterator[Any]:
        """Yield what all processes have finished; a line that a kill cut off is left out."""
        for file in sorted(self.folder.glob("rank*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def append(self, values: Iterable[Any]) -> None:
        """Add values and bring them to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{self.rank}.jsonl").open("a", encoding="utf-8") as file:
            # A line that a kill cut off ends here, lest it swallow the next one.
            file.write("\n" if file.tell() else "")
            file.writelines(json.dumps(value) + "\n" for value in values)
            file.flush()
            os.fsync(file.fileno())
