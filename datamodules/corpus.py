"""The reader of a token corpus: memory-mapped, so opening costs nothing and reading costs only what is read.

Notable: a corpus travels to loader workers as its path; each process opens its own map on first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from datamodules.corpus_format import (
    DOCUMENTS_FILE,
    META_FILE,
    OFFSET_DTYPE,
    TOKEN_DTYPES,
    TOKENS_FILE,
    digest,
    read_meta,
    token_dtype,
)
from datamodules.tokenizer_identity import IDENTITY_PREFIX, tokenizer_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Int64Array = npt.NDArray[np.int64]
RAW_BLOCK = 1 << 22


def open_split(folder: str | Path, split: str) -> TokenCorpus:
    """Open one split of a corpus folder.

    Raises:
        FileNotFoundError: no such folder or split; names those that are there.
        ValueError: the split is damaged.
    """
    path = Path(folder) / split
    if not (path / META_FILE).is_file():
        splits = sorted(meta.parent.name for meta in Path(folder).glob(f"*/{META_FILE}"))
        found = f"it has {', '.join(splits)}" if splits else "make it with python -m preprocess.tokenize"
        raise FileNotFoundError(f"no split {split} in the corpus folder {folder}: {found}")
    return TokenCorpus(path)


def open_corpus(path: str | Path, *, split: str) -> TokenCorpus:
    """Open one token corpus, or one split of a corpus folder; errors as `open_split`."""
    return TokenCorpus(path) if (Path(path) / META_FILE).is_file() else open_split(path, split)


class TokenCorpus:
    """Tokens and documents of one split.

    Args:
        path: folder written by ``preprocess.index.CorpusWriter``.

    Raises:
        FileNotFoundError: no corpus there.
        ValueError: a file is not as long as ``meta.json`` says, or ``meta.json`` is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta: dict[str, Any] = read_meta(self.path)
        self._tokens_path = self.path / TOKENS_FILE
        self._offsets: npt.NDArray[np.uint64] | None = None
        self._tokens: npt.NDArray[Any] | None = None
        self._check_sizes()

    @classmethod
    def from_raw(cls, path: str | Path, *, dtype: str = "uint16", eos_token_id: int = 50256) -> TokenCorpus:
        """Open a bare file of token ids (or a folder holding one called ``data``).

        The file is read once, in blocks: documents end at ``eos_token_id`` (a rest without it is a document too),
        ``vocab_size`` is the largest id + 1, ``identity`` is a digest of the content and these options.
        """
        file = Path(path) / "data" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no file of token ids at {file}")
        kind = np.dtype(TOKEN_DTYPES[token_dtype(dtype)])
        if file.stat().st_size % kind.itemsize:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, not a multiple of the {kind.itemsize} of {dtype}"
            )
        corpus = cls.__new__(cls)
        corpus.path, corpus._tokens_path, corpus._tokens = file, file, None
        corpus.meta, corpus._offsets = _scan_raw(file, kind, dtype=dtype, eos_token_id=eos_token_id)
        return corpus

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind; offsets recovered from a bare file have no other home and travel along."""
        kept = self._offsets if self._tokens_path == self.path else None
        return {**self.__dict__, "_tokens": None, "_offsets": kept}

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents, end-of-text tokens included."""
        return int(self.meta["num_tokens"])

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return int(self.meta["num_documents"])

    @property
    def document_lengths(self) -> Int64Array:
        """Tokens of every document, int64 ``[num_documents]``."""
        offsets = self._offset_map().astype(np.int64)
        return offsets[1:] - offsets[:-1]

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text, or None if unknown."""
        return self.meta.get("num_bytes")

    @property
    def vocab_size(self) -> int:
        """Every id is smaller than this."""
        return int(self.meta["vocab_size"])

    @property
    def eos_token_id(self) -> int | None:
        """End-of-text token, or None if documents are not ended by one."""
        return self.meta["eos_token_id"]

    @property
    def identity(self) -> str:
        """Digest of content and options; checkpoints store it."""
        return str(self.meta["identity"])

    def made_by(self, tokenizer: PreTrainedTokenizerFast) -> bool | None:
        """Say whether this is the tokenizer that the corpus was made with; None if no identity of one is noted."""
        made_by = str(self.meta.get("tokenizer"))
        return made_by == tokenizer_identity(tokenizer) if made_by.startswith(IDENTITY_PREFIX) else None

    def misfit(self, *, vocab_size: int | None, eos_token_ids: Collection[int]) -> str:
        """Say why a model cannot read this corpus; empty if nothing known speaks against it.

        Args:
            vocab_size: token ids the model knows; None if unknown.
            eos_token_ids: what the model takes for the end of a text; empty if unknown.
        """
        if vocab_size is not None and self.vocab_size > vocab_size:
            return f"the corpus has {self.vocab_size} token ids but the model only {vocab_size}"
        ends = self.eos_token_id if self.meta.get("append_eos", True) else None
        if ends is not None and eos_token_ids and ends not in eos_token_ids:
            model_ends = " or ".join(map(str, eos_token_ids))
            return f"the corpus ends documents with token {ends} but the model with {model_ends}"
        return ""

    def contains(self, token_id: int) -> bool:
        """Say whether a token occurs; reads the whole corpus unless the id lies outside its vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            return False
        tokens = self._token_map()
        blocks = range(0, len(tokens), RAW_BLOCK)
        return any(bool((tokens[start : start + RAW_BLOCK] == token_id).any()) for start in blocks)

    def read(self, start: int, stop: int) -> Int64Array:
        """Return tokens ``start .. stop - 1`` as a new int64 array ``[stop - start]``.

        Raises:
            ValueError: the range does not lie in the corpus.
        """
        self._check_range(start, stop)
        return self._token_map()[start:stop].astype(np.int64)

    def read_into(self, out: Int64Array, start: int) -> None:
        """Fill ``out`` [T] with the tokens from ``start`` on, converting in one pass."""
        self._check_range(start, start + len(out))
        out[:] = self._token_map()[start : start + len(out)]

    def document_ids(self, start: int, stop: int) -> Int64Array:
        """Return the document number of each token ``start .. stop - 1``, int64 ``[stop - start]``."""
        self._check_range(start, stop)
        if start == stop:
            return np.empty(0, np.int64)
        offsets = self._offset_map()
        # Python ints would turn the whole uint64 map into float64.
        first = int(np.searchsorted(offsets, np.uint64(start), side="right")) - 1
        last = int(np.searchsorted(offsets, np.uint64(stop), side="left"))
        lengths = np.diff(offsets[first : last + 1].astype(np.int64).clip(start, stop))
        if first < 0 or len(lengths) != last - first or (lengths < 0).any():
            raise ValueError(f"{self.path / DOCUMENTS_FILE} is damaged: see python -m preprocess.verify")
        return np.repeat(np.arange(first, last, dtype=np.int64), lengths)

    def document(self, index: int) -> Int64Array:
        """Return all tokens of a document as int64 ``[T]``.

        Raises:
            IndexError: no such document.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start, stop = (int(offset) for offset in self._offset_map()[index : index + 2])
        return self.read(start, stop)

    def _token_map(self) -> npt.NDArray[Any]:
        if self._tokens is None:
            self._tokens = _open_map(self._tokens_path, TOKEN_DTYPES[self.meta["dtype"]])
        return self._tokens

    def _offset_map(self) -> npt.NDArray[np.uint64]:
        if self._offsets is None:
            self._offsets = _open_map(self.path / DOCUMENTS_FILE, OFFSET_DTYPE)
        return self._offsets

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"tokens {start} to {stop} do not lie in the corpus {self.path} of {self.num_tokens} tokens"
            )

    def _check_sizes(self) -> None:
        item = np.dtype(TOKEN_DTYPES[token_dtype(self.meta["dtype"])]).itemsize
        expected = {TOKENS_FILE: self.num_tokens * item, DOCUMENTS_FILE: (self.num_documents + 1) * 8}
        for name, size in expected.items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else 0
            if found != size:
                raise ValueError(f"{file} is damaged: {size} bytes expected, {found} found; make the corpus again")


def _open_map(path: Path, dtype: str) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _scan_raw(
    file: Path, kind: np.dtype[Any], *, dtype: str, eos_token_id: int
) -> tuple[dict[str, Any], npt.NDArray[np.uint64]]:
    tokens, sha256, largest, ends = _open_map(file, kind.str), hashlib.sha256(), -1, [np.zeros(1, np.uint64)]
    for start in range(0, len(tokens), RAW_BLOCK):
        block = tokens[start : start + RAW_BLOCK]
        sha256.update(block.tobytes())
        largest = max(largest, int(block.max()))
        ends.append(np.flatnonzero(block == eos_token_id).astype(np.uint64) + np.uint64(start + 1))
    offsets = np.concatenate(ends)
    if int(offsets[-1]) != len(tokens):
        offsets = np.append(offsets, np.uint64(len(tokens)))
    meta: dict[str, Any] = {"format": "raw-tokens", "dtype": dtype, "eos_token_id": eos_token_id}
    meta |= {"num_tokens": len(tokens), "num_documents": len(offsets) - 1, "num_bytes": None}
    meta |= {"vocab_size": largest + 1, "sha256": {"tokens": sha256.hexdigest()}}
    return meta | {"identity": digest(meta)}, offsets
