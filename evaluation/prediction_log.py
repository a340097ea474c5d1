"""Predictions that are written one by one and survive a kill: lines of JSON, the last of which may be cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.results import json_text


class PredictionLog:
    """Records by key in a file that only grows.

    Args:
        path: the file; what it holds already is read.
        keys: names of the entries that tell records apart.

    Raises:
        ValueError: a line, other than a last one that was cut off, is no record.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]):
        self.path, self.keys = path, keys
        self.records: dict[tuple[Any, ...], dict[str, Any]] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[tuple(record[name] for name in keys)] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number} is damaged: remove the line, or the file") from error
        self._torn = len(whole) if len(whole) < len(content) else None

    def get(self, *key: Any) -> dict[str, Any] | None:
        """Return the record of a key, None if there is none yet."""
        return self.records.get(key)

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append a record and flush it to the disk; returns it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._torn is not None:  # only who writes cuts: another process may be writing what is read here
            os.truncate(self.path, self._torn)
            self._torn = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[tuple(record[name] for name in self.keys)] = dict(record)
        return dict(record)
