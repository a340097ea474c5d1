"""Where text comes from: files here, a hub data set, or Python's own library; chosen by one word."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.corpus_format import digest, file_sha256
from preprocess.documents import (
    TRAIN,
    VALIDATION,
    Document,
    LimitedSource,
    ReadOptions,
    Source,
    is_validation,
    split_of_name,
)
from preprocess.folders import NamedFile, files_in, name_in
from preprocess.hub import HUB_PREFIX, HubSource
from preprocess.python_stdlib import NAME as PYTHON_STDLIB
from preprocess.python_stdlib import StdlibSource
from preprocess.records import (
    JSON_SUFFIX,
    KNOWN_SUFFIXES,
    LINES_SUFFIXES,
    PARQUET_SUFFIX,
    RAW_SUFFIX,
    TEXT_SUFFIXES,
    read_rows,
    suffix_of,
)


class Part(NamedTuple):
    """A file of a source: where it is, its name inside the source, its split (None: decided per document)."""

    path: Path
    name: str
    split: str | None


def open_source(name: str | Path, options: ReadOptions | None = None, *, limit_documents: int | None = None) -> Source:
    """Open a source of text.

    Args:
        name: a folder or file, ``hub:NAME[:config]`` or ``python_stdlib``.
        options: how to read it.
        limit_documents: take only so many documents of each split.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: nothing readable in it.
    """
    source = _open(name, options or ReadOptions())
    return source if limit_documents is None else LimitedSource(source, limit_documents)


def _open(name: str | Path, options: ReadOptions) -> Source:
    if not str(name):
        raise ValueError(f"no source is named: give a folder, a file, {HUB_PREFIX}NAME or {PYTHON_STDLIB}")
    if str(name).startswith(HUB_PREFIX):
        return HubSource(str(name).removeprefix(HUB_PREFIX), options)
    if str(name) == PYTHON_STDLIB:
        return StdlibSource(options)
    return FileSource(Path(name), options)


class FileSource:
    """A file, or all readable files of a folder in the order of their names."""

    def __init__(self, path: Path, options: ReadOptions):
        if not path.exists():
            raise FileNotFoundError(f"no text at {path}: give a folder, a file, {HUB_PREFIX}NAME or {PYTHON_STDLIB}")
        self.path, self.options = path, options
        self.name = path.name.split(".")[0] or "text"
        self.parts = _parts(path, options)
        self.num_parts = len(self.parts)

    def describe(self) -> dict[str, Any]:
        """Digest of names, splits and content of all files, and the reading options."""
        files = [[part.name, part.split, file_sha256(part.path)] for part in self.parts]
        return {"kind": "files", "files": len(files), "sha256": digest(files), "options": self.options.described()}

    def documents(self, part: int = 0, row: int = 0, *, full: Collection[str] = ()) -> Iterator[Document]:
        """Yield the documents from a place on; files of ``full`` splits are not opened."""
        for number in range(part, len(self.parts)):
            split = self.parts[number].split
            if split in full or (split is None and {TRAIN, VALIDATION} <= set(full)):
                continue
            yield from self._documents_of(number, row if number == part else 0)

    def _documents_of(self, number: int, first_row: int) -> Iterator[Document]:
        part = self.parts[number]
        rows = read_rows(part.path, self.options, row=first_row)
        for row, text in _joined(rows) if self.options.join_rows else rows:
            split = part.split
            if split is None:
                held_out = is_validation(text, self.options.validation_fraction)
                split = VALIDATION if held_out else TRAIN
            if not self.options.splits or split in self.options.splits:
                yield Document(text, len(text.encode()), split, number, row)


def _joined(rows: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Make one document of all rows; its place is that of the last."""
    numbered = list(rows)
    if numbered:
        yield numbered[-1][0], "".join(text for _, text in numbered)


def _parts(path: Path, options: ReadOptions) -> list[Part]:
    if path.is_file():
        if suffix_of(path) is None:
            raise ValueError(f"{path} is of no known kind: use one of {', '.join(KNOWN_SUFFIXES)}")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty: nothing to tokenise")
        return _with_splits([(path, name_in(path.parent, path))], options)
    chosen = _of_one_kind(path, files_in(path), suffixes=options.suffixes)
    if not chosen:
        wanted = options.suffixes or KNOWN_SUFFIXES
        raise ValueError(f"{path} holds no file to read: looked for {', '.join(wanted)}")
    return _with_splits(chosen, options)


def _of_one_kind(path: Path, files: list[NamedFile], *, suffixes: tuple[str, ...]) -> list[NamedFile]:
    """Keep the files asked for; else the data files, whose readme and licence are not text to train on; else text."""
    if suffixes:
        return [entry for entry in files if entry[1].lower().endswith(tuple(suffix.lower() for suffix in suffixes))]
    kinds = {name: suffix_of(file) for file, name in files}
    data = [entry for entry in files if kinds[entry[1]] in (*LINES_SUFFIXES, PARQUET_SUFFIX, RAW_SUFFIX)]
    lines = [entry for entry in files if kinds[entry[1]] == JSON_SUFFIX]
    texts = [entry for entry in files if kinds[entry[1]] in TEXT_SUFFIXES]
    if lines and texts and not data:
        raise ValueError(f"{path} holds both text and .json files: say which with --suffix, as in --suffix .json")
    return data + lines if data else texts or lines


def _with_splits(files: list[NamedFile], options: ReadOptions) -> list[Part]:
    """Give every file its split: by name where names say; held-out documents come out of the training files."""
    named = {name: split_of_name(name) for _, name in files}
    splits: dict[str, str | None] = {name: split or TRAIN for name, split in named.items()}
    if VALIDATION not in named.values() and TRAIN in splits.values() and options.validation_fraction > 0:
        whole_files = all(suffix_of(file) in TEXT_SUFFIXES for file, _ in files)
        training = [name for name, split in splits.items() if split == TRAIN]
        if not whole_files:
            splits |= dict.fromkeys(training)
        elif len(training) > 1:  # a single document is there to train on
            held_out = _held_out(training, options.validation_fraction)
            splits |= {name: VALIDATION if name in held_out else TRAIN for name in training}
    parts = [Part(file, name, splits[name]) for file, name in sorted(files, key=lambda entry: entry[1])]
    return [part for part in parts if part.split is None or not options.splits or part.split in options.splits]


def _held_out(names: list[str], fraction: float) -> set[str]:
    """Choose the validation files by hash of their name, at least one."""
    chosen = {name for name in names if is_validation(name, fraction)}
    return chosen or {min(names, key=digest)}
