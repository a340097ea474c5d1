"""The writer of a token corpus (format: ``datamodules.corpus_format``).

Notable: tokens go straight to disk, so memory is bounded by one document; the folder appears under its name only
when it is complete.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from datamodules.corpus_format import (
    DOCUMENTS_FILE,
    FORMAT,
    META_FILE,
    OFFSET_DTYPE,
    TOKEN_DTYPES,
    TOKENS_FILE,
    VERSION,
    canonical_json,
    file_sha256,
    identity_of,
    token_dtype,
)

WRITE_BUFFER = 1 << 20


class Counts(NamedTuple):
    """How much of a corpus there is; ``num_bytes`` of text is None if unknown."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int | None = 0


NOTHING = Counts()


class CorpusFiles:
    """``tokens.bin`` and ``documents.bin`` of a corpus being written; can stop and go on at a known length.

    Args:
        folder: existing folder of the two files.
        dtype: ``uint16`` or ``uint32``.
        vocab_size: every id must be smaller.
        append: id that ends every document, None for none.
        counts: what is already there; whatever a killed process wrote after it is cut off.

    Raises:
        ValueError: the vocabulary does not fit the dtype.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str,
        vocab_size: int,
        append: int | None = None,
        counts: Counts = NOTHING,
    ):
        self.folder, self.dtype, self.vocab_size = Path(folder), dtype, vocab_size
        self.num_tokens, self.num_documents, self.num_bytes = counts
        self._kind = np.dtype(TOKEN_DTYPES[dtype])
        self._end = np.array([] if append is None else [append], self._kind)
        check_vocabulary(vocab_size, dtype)
        self._tokens = _open_at(self.folder / TOKENS_FILE, counts.num_tokens * self._kind.itemsize)
        self._documents = _open_at(
            self.folder / DOCUMENTS_FILE, (counts.num_documents + 1) * 8 if counts.num_documents else 0
        )
        if not counts.num_documents:
            self._write_offset()

    def add(self, token_ids: npt.ArrayLike, num_bytes: int | None = None) -> None:
        """Append a document; arguments and errors as ``CorpusWriter.add``."""
        ids = check_ids(token_ids, self.vocab_size)
        self._tokens.write(ids.astype(self._kind).tobytes() + self._end.tobytes())
        self.num_tokens += len(ids) + len(self._end)
        self.num_documents += 1
        self.num_bytes = None if num_bytes is None or self.num_bytes is None else self.num_bytes + num_bytes
        self._write_offset()

    @property
    def counts(self) -> Counts:
        """How much has been added, and was there before."""
        return Counts(self.num_tokens, self.num_documents, self.num_bytes)

    def sync(self) -> None:
        """Bring everything to the disk."""
        for file in (self._tokens, self._documents):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close both files; a full disk may keep what is still buffered from being written."""
        for file in (self._tokens, self._documents):
            try:
                file.close()
            except OSError:
                # The first failed write has already been reported; closing only repeats it.
                continue

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Close the files and write ``meta.json``; ``fields`` are those the writer does not know."""
        self.sync()
        self.close()
        meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "dtype": self.dtype}
        meta |= {**self.counts._asdict(), "vocab_size": self.vocab_size, **fields}
        meta["sha256"] = {name: file_sha256(self.folder / name) for name in (TOKENS_FILE, DOCUMENTS_FILE)}
        meta["identity"] = identity_of(meta)
        write_text(self.folder / META_FILE, canonical_json(meta) + "\n")
        return meta

    def _write_offset(self) -> None:
        self._documents.write(np.array(self.num_tokens, OFFSET_DTYPE).tobytes())


class CorpusWriter:
    """Write one corpus; a context manager that leaves either the whole corpus or nothing.

    Args:
        path: folder to make.
        dtype: ``uint16`` or ``uint32``.
        tokenizer: identity of the tokenizer.
        vocab_size: every id must be smaller.
        eos_token_id: end-of-text token.
        source: identity of the text.
        append_eos: end every document with ``eos_token_id``.
        overwrite: replace what is at ``path`` (only when the new corpus is complete).

    Raises:
        FileExistsError: something is at ``path`` and ``overwrite`` is off, or it is no corpus.
        ValueError: the vocabulary does not fit the dtype, or the end-of-text token the vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Any,
        tokenizer: Any,
        vocab_size: int,
        eos_token_id: int | None,
        source: Any,
        append_eos: bool = True,
        overwrite: bool = False,
    ):
        self.path, self.overwrite = Path(path), overwrite
        if is_taken(self.path) and not overwrite:
            raise FileExistsError(f"{self.path} exists: choose another path or overwrite it")
        if is_taken(self.path) and not (self.path / META_FILE).is_file():
            raise FileExistsError(f"{self.path} is no token corpus and is not overwritten: choose another path")
        if is_taken(self.path):
            refuse_foreign(self.path, (TOKENS_FILE, DOCUMENTS_FILE, META_FILE))
        check_eos(eos_token_id, vocab_size, append_eos=append_eos)
        self._fields = {
            "tokenizer": tokenizer,
            "eos_token_id": eos_token_id,
            "append_eos": append_eos,
            "source": source,
        }
        self._format: dict[str, Any] = {"dtype": token_dtype(dtype), "vocab_size": vocab_size}
        self._format["append"] = eos_token_id if append_eos else None
        check_vocabulary(vocab_size, self._format["dtype"])
        self._folder = self.path.parent / f".{self.path.name}.{secrets.token_hex(4)}.partial"

    def __enter__(self) -> CorpusWriter:
        self._folder.mkdir(parents=True)
        self._files = CorpusFiles(self._folder, **self._format)
        return self

    def add(self, token_ids: npt.ArrayLike, num_bytes: int | None = None) -> None:
        """Append a document.

        Args:
            token_ids: its ids, without the end-of-text token that ``append_eos`` adds.
            num_bytes: UTF-8 bytes of its text; one unknown document makes the total unknown.

        Raises:
            ValueError: an id is negative or not in the vocabulary.
        """
        self._files.add(token_ids, num_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._files.finish(**self._fields)
                move_into_place(self._folder, self.path, overwrite=self.overwrite)
        finally:
            self._files.close()
            shutil.rmtree(self._folder, ignore_errors=True)


def check_ids(token_ids: npt.ArrayLike, vocab_size: int) -> npt.NDArray[np.int64]:
    """Return token ids as int64.

    Raises:
        ValueError: not a flat list of integers in ``0 .. vocab_size - 1``.
    """
    given = np.asarray(token_ids)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"a document is a flat list of token ids, got shape {given.shape} of {given.dtype}")
    ids = given.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"token id {wrong} is not in the vocabulary of {vocab_size}: wrong tokenizer?")
    return ids


def check_vocabulary(vocab_size: int, dtype: str) -> None:
    """Raise ValueError if ids below ``vocab_size`` do not all fit ``dtype``."""
    if vocab_size > 1 << 8 * np.dtype(TOKEN_DTYPES[dtype]).itemsize:
        raise ValueError(f"a vocabulary of {vocab_size} does not fit {dtype}: use dtype uint32")


def check_eos(eos_token_id: int | None, vocab_size: int, *, append_eos: bool) -> None:
    """Raise ValueError if the end-of-text token is missing or not in the vocabulary."""
    if eos_token_id is None and append_eos:
        raise ValueError("append_eos needs an eos_token_id, got None: name one or switch append_eos off")
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id {eos_token_id} is not in the vocabulary of {vocab_size}")


def refuse_foreign(path: Path, own: Collection[str]) -> None:
    """Raise FileExistsError if there is more at ``path`` than entries called ``own``, which may be replaced."""
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    foreign = sorted(found.difference(own))
    if foreign:
        raise FileExistsError(
            f"{path} also holds {', '.join(foreign[:3])}, which would be lost: choose another path or move it away"
        )


def is_taken(path: Path) -> bool:
    """Say whether something is at a path; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def move_into_place(folder: Path, path: Path, *, overwrite: bool) -> None:
    """Rename a complete folder to its name, replacing what is there only if told to.

    Raises:
        FileExistsError: something is at ``path`` and ``overwrite`` is off.
    """
    if is_taken(path):
        if not overwrite:
            raise FileExistsError(f"{path} appeared meanwhile: choose another path or overwrite it")
        old = path.parent / f".{path.name}.{secrets.token_hex(4)}.old"
        path.rename(old)
        folder.rename(path)
        shutil.rmtree(old)
    else:
        folder.rename(path)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_at(path: Path, size: int) -> BinaryIO:
    file = open(path, "ab", buffering=WRITE_BUFFER)  # noqa: SIM115 - closed by CorpusFiles.close
    if os.fstat(file.fileno()).st_size < size:
        file.close()
        raise ValueError(f"{path} is shorter than the {size} bytes noted for it: remove {path.parents[1]}, start again")
    file.truncate(size)
    return file
