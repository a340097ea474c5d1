"""Documents with their summaries: files here, a data set of the hub, or the docstrings of Python's own library.

Notable: columns are found by the names of the published data sets: XSum has ``document`` and ``summary``, CNN/DailyMail
``article`` and ``highlights``.
"""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple, Protocol

from datamodules.corpus_format import digest, file_sha256
from preprocess.documents import SPLITS, TEST, TRAIN, VALIDATION, ReadOptions, is_validation, split_of_name
from preprocess.folders import NamedFile, files_in, name_in
from preprocess.hub import HUB_PREFIX, HubSource
from preprocess.python_stdlib import NAME as PYTHON_STDLIB
from preprocess.python_stdlib import StdlibSource
from preprocess.summary_rows import ROW_SUFFIXES, Row, read_records, row_suffix

KNOWN_COLUMNS = (("document", "summary"), ("article", "highlights"))
HELD_OUT = 0.05
DOCSTRING_LENGTHS = (20, 200)
SOURCE_LENGTHS = (200, 6000)


class Pair(NamedTuple):
    """A document with its summary.

    Attributes:
        document: text.
        summary: text.
        split: ``train``, ``validation`` or ``test``.
        name: its id in the data set.
        place: where it was found, for messages.
    """

    document: str
    summary: str
    split: str
    name: str
    place: str


@dataclass(frozen=True)
class Columns:
    """Where the two texts are; None is found by the published names."""

    document: str | None = None
    summary: str | None = None

    def __post_init__(self) -> None:
        if self.document is not None and self.document == self.summary:
            raise ValueError(f"document and summary are different columns, got {self.document} for both")

    def take(self, record: dict[str, Any], place: str) -> tuple[str, str]:
        """Return document and summary of a row.

        Raises:
            ValueError: no such column, or something else than text in it.
        """
        known = next((pair for pair in KNOWN_COLUMNS if set(pair) <= record.keys()), (None, None))
        names = self.document or known[0], self.summary or known[1]
        texts = []
        for role, name in zip(("document", "summary"), names, strict=True):
            if name not in record:
                published = "document or article, summary or highlights"
                wanted = f"column {name}" if name else f"column for the {role} ({published})"
                choices = ", ".join(map(str, record))
                raise ValueError(f"{place} has no {wanted}: name its {role}_column (--{role}-column) among {choices}")
            if not isinstance(record[name], str | None):
                raise ValueError(f"{place}: column {name} holds {type(record[name]).__name__}, not text")
            texts.append(_encodable(record[name] or "", f"{place}: column {name}"))
        return texts[0], texts[1]


def _encodable(text: str, place: str) -> str:
    """Return a text that UTF-8 can hold; JSON can name halves of surrogate pairs, which it cannot.

    Raises:
        ValueError: it cannot; names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half a surrogate pair at {error.start}: mend it") from error
    return text


class PairSource(Protocol):
    """Pairs in a fixed order."""

    name: str

    def describe(self) -> dict[str, Any]:
        """Return plain values that change whenever the pairs do."""

    def pairs(self) -> Iterator[Pair]:
        """Yield the pairs."""


class FilePairs:
    """A file, or the data files of a folder in the order of their names; splits are told by names."""

    def __init__(self, path: Path, columns: Columns):
        if not path.exists():
            raise FileNotFoundError(f"no pairs at {path}: give a file, a folder, {HUB_PREFIX}NAME or {PYTHON_STDLIB}")
        self.name, self.columns = path.name.split(".")[0] or "summaries", columns
        self.files = [(path, name_in(path.parent, path))] if path.is_file() else _data_files(path)

    def describe(self) -> dict[str, Any]:
        """Digest of names and content of all files, and the columns."""
        files = [[name, file_sha256(path)] for path, name in self.files]
        return {"kind": "files", "sha256": digest(files), "columns": vars(self.columns)}

    def pairs(self) -> Iterator[Pair]:
        """Yield the pairs; without a validation file, one in twenty training pairs is held out by hash."""
        splits = {name: split_of_name(name) or TRAIN for _, name in self.files}
        share = 0.0 if VALIDATION in splits.values() else HELD_OUT
        for path, name in self.files:
            yield from _pairs(read_records(path), splits[name], self.columns, share=share)


class HubPairs:
    """A data set of the hub, streamed at a pinned revision."""

    def __init__(self, name: str, columns: Columns):
        self.source, self.columns = HubSource(name, ReadOptions()), columns
        self.name = self.source.name

    def describe(self) -> dict[str, Any]:
        """Name, configuration and revision, and the columns."""
        described = self.source.describe()
        return {name: described[name] for name in ("kind", "name", "config", "revision")} | {
            "columns": vars(self.columns)
        }

    def pairs(self) -> Iterator[Pair]:
        """Yield the pairs, split by split."""
        share = 0.0 if VALIDATION in self.source.streams else HELD_OUT
        for split, rows in self.source.streams.items():
            records: Iterator[Row] = (
                (f"{self.source.repository} {split} row {number}", record) for number, record in enumerate(rows)
            )
            yield from _pairs(records, split, self.columns, share=share)


class DocstringPairs:
    """Functions and classes of Python's standard library; the first paragraph of a docstring is the summary.

    The document is the source without that docstring. Splits are by file, so no file is in two of them.
    """

    name = PYTHON_STDLIB

    def __init__(self) -> None:
        self.source = StdlibSource(ReadOptions(validation_fraction=0.1))

    def describe(self) -> dict[str, Any]:
        """What the library says of itself, and the bounds of the texts."""
        return self.source.describe() | {"pairs": "docstrings", "characters": [DOCSTRING_LENGTHS, SOURCE_LENGTHS]}

    def pairs(self) -> Iterator[Pair]:
        """Yield the pairs; half of the held-out files are for testing."""
        for document in self.source.documents():
            name = self.source.names[document.part]
            split = document.split
            if split == VALIDATION and is_validation(f"test {name}", 0.5):
                split = TEST
            if name.endswith(".py"):
                for place, text, summary in docstrings(document.text):
                    yield Pair(text, summary, split, f"{name}:{place}", f"{name} line {place}")


def docstrings(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, source without docstring, and first paragraph of the docstring, of every function and class."""
    lines = source.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # about escapes in what is only read
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        summary, first = " ".join(text.split("\n\n")[0].split()), node.body[0]
        rest = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        document = dedent("\n".join(rest))
        bounds = ((summary, DOCSTRING_LENGTHS), (document, SOURCE_LENGTHS))
        if all(low <= len(given) <= high for given, (low, high) in bounds):
            yield node.lineno, document, summary


class FirstPairs:
    """The first pairs of each split of a source."""

    def __init__(self, source: PairSource, limit: int):
        if limit < 1:
            raise ValueError(f"limit_pairs must be at least 1, got {limit}")
        self.source, self.limit, self.name = source, limit, source.name

    def describe(self) -> dict[str, Any]:
        """The whole source and the limit."""
        return self.source.describe() | {"limit_pairs": self.limit}

    def pairs(self) -> Iterator[Pair]:
        """Yield pairs while their split has room; nothing more is read when all splits are full."""
        taken: Counter[str] = Counter()
        for pair in self.source.pairs():
            if taken[pair.split] < self.limit:
                taken[pair.split] += 1
                yield pair
            if all(taken[split] == self.limit for split in SPLITS):
                return


def open_pairs(name: str | Path, columns: Columns, *, limit: int | None = None) -> PairSource:
    """Open a file, a folder, ``hub:NAME[:config]`` or ``python_stdlib``.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: nothing readable there, or columns for a source that has none.
    """
    source: PairSource
    if str(name) == PYTHON_STDLIB:
        if columns != Columns():
            raise ValueError(f"{PYTHON_STDLIB} has no columns: leave them out")
        source = DocstringPairs()
    elif str(name).startswith(HUB_PREFIX):
        source = HubPairs(str(name).removeprefix(HUB_PREFIX), columns)
    else:
        source = FilePairs(Path(name), columns)
    return source if limit is None else FirstPairs(source, limit)


def _pairs(records: Iterator[Row], split: str, columns: Columns, *, share: float) -> Iterator[Pair]:
    for number, (place, record) in enumerate(records):
        document, summary = columns.take(record, place)
        held_out = split == TRAIN and is_validation(document, share)
        name = record.get("id", number)
        yield Pair(document, summary, VALIDATION if held_out else split, str(name), place)


def _data_files(path: Path) -> list[NamedFile]:
    """Return the files of the first kind that a folder holds, with their names in it."""
    files = files_in(path)
    for suffix in ROW_SUFFIXES:
        if chosen := [(file, name) for file, name in files if row_suffix(file) == suffix]:
            return chosen
    raise ValueError(f"{path} holds no file to read: looked for {', '.join(ROW_SUFFIXES)}")
