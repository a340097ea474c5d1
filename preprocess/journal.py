"""The half-made corpus folder: which work it belongs to, how far it is, and how it goes on after a kill.

Notable: token files only grow; the journal says how much of them counts, and is replaced in one step after they
have reached the disk. Whatever a killed process wrote after that is cut off when the work goes on.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from datamodules.corpus_format import canonical_json, identity_of
from preprocess.encode import Encoded
from preprocess.index import NOTHING, CorpusFiles, Counts, write_text

JOURNAL_FILE, LOCK_FILE = "journal.json", "lock"


class WorkFolder:
    """Folder of one piece of work, held by one process at a time.

    Args:
        folder: made if missing.

    Raises:
        RuntimeError: another process is at this work.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock: BinaryIO = open(folder / LOCK_FILE, "ab")  # noqa: SIM115 - held until the work ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise RuntimeError(f"another process is making {folder}: wait for it, then run this again") from error

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def clear_tools(self) -> None:
        """Remove what is not part of the corpus folder."""
        for name in (JOURNAL_FILE, LOCK_FILE):
            (self.folder / name).unlink(missing_ok=True)


class Journal:
    """Token files of all splits and how much of them counts.

    Args:
        folder: the work folder.
        dtype: of the token files.
        vocab_size: every id must be smaller.
        append: id that ends every document, None for none.
    """

    def __init__(self, folder: Path, *, dtype: str, vocab_size: int, append: int | None):
        self.folder = folder
        self._format: dict[str, Any] = {"dtype": dtype, "vocab_size": vocab_size, "append": append}
        state = read_state(folder / JOURNAL_FILE) or {"part": 0, "row": 0, "skipped": 0, "splits": {}}
        self.part, self.row = state["part"], state["row"]
        self.skipped: int = state["skipped"]
        self.files = {split: self._open(split, Counts(**counts)) for split, counts in state["splits"].items()}

    @property
    def num_documents(self) -> int:
        """Documents written."""
        return sum(files.num_documents for files in self.files.values())

    @property
    def num_tokens(self) -> int:
        """Tokens written."""
        return sum(files.num_tokens for files in self.files.values())

    def add(self, document: Encoded) -> None:
        """Append a document to its split; one without a token is counted and left out."""
        self.part, self.row = document.part, document.row + 1
        if not len(document.ids):
            self.skipped += 1
            return
        if document.split not in self.files:
            self.files[document.split] = self._open(document.split)
        self.files[document.split].add(document.ids, document.num_bytes)

    def commit(self) -> None:
        """Make everything added so far count, whatever happens next."""
        for files in self.files.values():
            files.sync()
        splits = {split: files.counts._asdict() for split, files in self.files.items()}
        state = {"part": self.part, "row": self.row, "skipped": self.skipped, "splits": splits}
        write_state(self.folder / JOURNAL_FILE, state)

    def close(self) -> None:
        """Close all files."""
        for files in self.files.values():
            files.close()

    def _open(self, split: str, counts: Counts = NOTHING) -> CorpusFiles:
        folder = self.folder / split
        folder.mkdir(exist_ok=True)
        return CorpusFiles(folder, **self._format, counts=counts)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a journal in one step."""
    write_text(path, canonical_json({**state, "identity": identity_of(state)}) + "\n")


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what a journal says; None if there is none.

    Raises:
        ValueError: it is not what was written.
    """
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): what is half done begins anew; run this again") from error
    if not isinstance(state, dict) or state.pop("identity", None) != identity_of(state):
        raise ValueError(f"{path} is damaged: what is half done begins anew; run this again")
    return state
