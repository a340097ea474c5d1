"""What a source of text is: documents in a fixed order, each with its split and its place in that order.

Notable: the place (part, row) is all a killed run needs to go on; parts are files or hub splits, rows lie in them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
DEFAULT_VALIDATION_FRACTION = 0.05
TEXT_COLUMN = "text"
# WikiText and C4 put their own names in front.
SPLIT_NAME = re.compile(r"(?:wiki\.|c4-)?(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
SPLIT_OF_NAME = {"train": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION}
SPLIT_OF_NAME["test"] = TEST


class Document(NamedTuple):
    """One document.

    Attributes:
        text: its text; can be encoded as UTF-8.
        num_bytes: UTF-8 bytes of the text.
        split: ``train``, ``validation`` or ``test``.
        part: number of the part of the source it comes from.
        row: number of the document in that part.
    """

    text: str
    num_bytes: int
    split: str
    part: int
    row: int


@dataclass(frozen=True)
class ReadOptions:
    """How raw text is read; part of the identity of what is made from it.

    Attributes:
        text_column: column (parquet, hub) or key (json lines) of the text.
        errors: ``strict`` stops at bytes that are not UTF-8, ``replace`` puts U+FFFD in their place.
        validation_fraction: share of the documents, by hash, that are validation where file names do not say.
        where: keep only rows with this value, as ``key.key=value``.
        join_rows: all rows of a file are one document (WikiText has a line per row).
        suffixes: files of a folder to read; default: every kind that is known.
        splits: splits to keep; default all.
    """

    text_column: str = TEXT_COLUMN
    errors: Literal["strict", "replace"] = "strict"
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION
    where: str | None = None
    join_rows: bool = False
    suffixes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction lies in [0, 1), got {self.validation_fraction}")
        if self.errors not in ("strict", "replace"):
            raise ValueError(f"errors is strict or replace, got {self.errors}")
        if self.where is not None and "=" not in self.where[1:]:
            raise ValueError(f"where reads key=value or key.key=value, got {self.where}")
        if not self.text_column or "" in self.suffixes:
            raise ValueError("text_column and suffixes must not be empty")
        unknown = set(self.splits) - set(SPLITS)
        if unknown:
            raise ValueError(f"splits are {', '.join(SPLITS)}, got {', '.join(sorted(unknown))}")

    def described(self) -> dict[str, Any]:
        """The options as plain values, for the identity."""
        return asdict(self) | {"suffixes": list(self.suffixes), "splits": list(self.splits)}


class Source(Protocol):
    """Documents in a fixed order."""

    name: str
    num_parts: int

    def describe(self) -> dict[str, Any]:
        """Return plain values that change whenever the documents do."""

    def documents(self, part: int = 0, row: int = 0, *, full: Collection[str] = ()) -> Iterator[Document]:
        """Yield the documents from a place on, empty ones too; parts that only fill ``full`` splits may be left out."""


class LimitedSource:
    """The first documents of each split of a source.

    Args:
        source: all documents.
        limit: documents to take of each split.
    """

    def __init__(self, source: Source, limit: int):
        if limit < 1:
            raise ValueError(f"limit_documents must be at least 1, got {limit}")
        self.source, self.limit = source, limit
        self.name, self.num_parts = source.name, source.num_parts

    def describe(self) -> dict[str, Any]:
        """The whole source and the limit."""
        return self.source.describe() | {"limit_documents": self.limit}

    def documents(self, part: int = 0, row: int = 0, *, full: Collection[str] = ()) -> Iterator[Document]:
        """Yield the documents from a place on; those before it are read again, as they count."""
        taken: Counter[str] = Counter()
        done = set(full)
        for document in self.source.documents(full=done):
            if document.split in done:
                continue
            taken[document.split] += 1
            if taken[document.split] == self.limit:
                done.add(document.split)
            if (document.part, document.row) >= (part, row):
                yield document


def split_of_name(name: str) -> str | None:
    """Return the split that a relative file name says: a folder called so, or a file name that begins so."""
    *folders, file = name.split("/")
    for folder in folders:
        if folder.lower() in SPLIT_OF_NAME:
            return SPLIT_OF_NAME[folder.lower()]
    match = SPLIT_NAME.match(file)
    return SPLIT_OF_NAME[match[1].lower()] if match else None


def is_validation(key: str, fraction: float) -> bool:
    """Decide by hash, the same on every machine, whether a document belongs to the validation share."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") < fraction * 2**64


def matches(record: dict[str, Any], where: str) -> bool:
    """Say whether a row has the value asked for; a text on the way is taken for JSON (some hub sets store it so)."""
    path, wanted = where.split("=", 1)
    value: Any = record
    for key in path.split("."):
        if isinstance(value, str):
            value = _json_or_none(value)
        value = value.get(key) if isinstance(value, dict) else None
    return str(value) == wanted


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
