"""Fixed-length sequences on disk: one stretch of one document each, right-padded, memory-mapped.

A store is a folder of four files:

* ``tokens.npy``: int32 [n, C], right-padded with 0;
* ``index.npy``: int64 [n, 4] = (document, offset, num_tokens, first_target);
* ``hashes.npy``: uint8 [n, 16], BLAKE2b-128 of the little-endian int32 bytes of the real tokens;
* ``meta.json``: options, counts, ``store_id``, the SHA-256 of everything that a score depends on, the SHA-256 of the
  three arrays, and ``identity``, the SHA-256 of everything else in the file.

Notable: a sequence is checked against its hash whenever it is read, and its padding, so no score and no loss ever comes
from a damaged one. A store travels to loader workers without its tokens; each process opens its own map on first use.

Letters: n sequences, C tokens of a sequence, T = C - 1 targets (target t is the token at position t + 1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from datamodules.corpus_format import META_FILE, digest, identity_of

if TYPE_CHECKING:
    # Importing torch takes seconds; what writes stores, in several processes, has no need of it.
    import torch

FORMAT = "token-sequences"
VERSION = 1
TOKENS_ARRAY, INDEX_ARRAY, HASHES_ARRAY = "tokens.npy", "index.npy", "hashes.npy"
TOKEN_DTYPE = np.dtype("<i4")
INDEX_DTYPE = np.dtype("<i8")
HASH_SIZE = 16
PADDING_TOKEN = 0
IDENTITY_FIELDS = ("format", "version", "length", "bos_token_id", "tail", "parity", "tokenizer")

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class StoredSequence(TypedDict):
    """One sequence.

    Attributes:
        input_ids: ``[C]`` int64, padding included.
        valid: ``[T]`` bool, the targets that count.
        sequence_index: number of the sequence in its store.
    """

    input_ids: torch.Tensor
    valid: torch.Tensor
    sequence_index: int


class SequenceStore:
    """Sequences written by ``python -m preprocess.chunk_documents``.

    Args:
        path: folder of the store.

    Raises:
        FileNotFoundError: no store there.
        ValueError: a file is missing, torn or not the one that ``meta.json`` describes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = read_sequence_meta(self.path)
        self.length = int(self.meta["length"])
        self.store_id = str(self.meta["store_id"])
        self.bos_token_id: int | None = self.meta["bos_token_id"]
        self._tokens: Int32Array | None = None
        count = int(self.meta["num_sequences"])
        self.index: Int64Array = self._open(INDEX_ARRAY, (count, 4), INDEX_DTYPE)
        """int64 [n, 4]: document, offset, num_tokens, first_target."""
        self._hashes = self._open(HASHES_ARRAY, (count, HASH_SIZE), np.dtype(np.uint8))
        self._token_map()
        if store_id_of(self.meta, self.index, self._hashes) != self.store_id:
            raise ValueError(
                f"{self.path} is damaged: index or hashes are not those of its store_id ({INDEX_ARRAY} or "
                f"{HASHES_ARRAY}); make it again"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map of the tokens behind."""
        return {**self.__dict__, "_tokens": None}

    def misfit(self, *, vocab_size: int | None, eos_token_ids: Collection[int]) -> str:
        """Say why a model cannot read these sequences; empty if nothing known speaks against it.

        Args:
            vocab_size: token ids the model knows; None if unknown.
            eos_token_ids: what the model takes for the end of a text; sequences say nothing about theirs.
        """
        largest = int(self.meta["max_token_id"])
        if vocab_size is not None and largest >= vocab_size:
            return f"the sequences hold token {largest} but the model knows only {vocab_size}"
        return ""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_targets(self) -> Int64Array:
        """Valid targets of every sequence, int64 [n]."""
        return self.index[:, 2] - 1 - self.index[:, 3]

    def valid(self, number: int) -> torch.Tensor:
        """Return which targets of a sequence count, bool [T]: first_target <= t < num_tokens - 1."""
        import torch

        _, _, num_tokens, first_target = (int(value) for value in self.index[number])
        valid = torch.zeros(self.length - 1, dtype=torch.bool)
        valid[first_target : num_tokens - 1] = True
        return valid

    def __getitem__(self, number: int) -> StoredSequence:
        import torch

        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        tokens, end = self._token_map()[number], self.index[number, 2]
        if sequence_hash(tokens[:end]) != self._hashes[number].tobytes() or (tokens[end:] != PADDING_TOKEN).any():
            raise ValueError(
                f"sequence {number} of {self.path} is damaged: its hash differs ({TOKENS_ARRAY}); make the store again"
            )
        return StoredSequence(
            input_ids=torch.from_numpy(tokens.astype(np.int64)),
            valid=self.valid(number),
            sequence_index=int(number),
        )

    def _token_map(self) -> Int32Array:
        if self._tokens is None:
            self._tokens = self._open(TOKENS_ARRAY, (len(self), self.length), TOKEN_DTYPE)
        return self._tokens

    def _open(self, name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        file, mode = self.path / name, "r" if name == TOKENS_ARRAY else None
        try:
            array = np.load(file, mmap_mode=mode)  # type: ignore[arg-type]
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} is missing or torn ({error}): make the store again") from error
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{file} is damaged: {dtype} {shape} expected, {array.dtype} {array.shape} found")
        return array  # type: ignore[no-any-return]


def open_sequences(sequences: SequenceStore | str | Path) -> SequenceStore:
    """Return a store that is given itself or as its path."""
    return sequences if isinstance(sequences, SequenceStore) else SequenceStore(sequences)


def sequence_hash(tokens: Int32Array) -> bytes:
    """Return BLAKE2b-128 of the little-endian int32 bytes of the real tokens ``[C]`` of a sequence."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, TOKEN_DTYPE).tobytes(), digest_size=HASH_SIZE).digest()


def store_id_of(meta: Mapping[str, Any], index: Int64Array, hashes: npt.NDArray[np.uint8]) -> str:
    """Return the SHA-256 over format, options, tokenizer, index ``[n, 4]`` and hashes ``[n, 16]``, but no path."""
    identity = {name: meta[name] for name in IDENTITY_FIELDS}
    identity["index"] = hashlib.sha256(np.ascontiguousarray(index, INDEX_DTYPE).tobytes()).hexdigest()
    identity["hashes"] = hashlib.sha256(np.ascontiguousarray(hashes, np.uint8).tobytes()).hexdigest()
    return digest(identity)


def read_sequence_meta(path: str | Path) -> dict[str, Any]:
    """Read and check ``meta.json`` of a sequence store.

    Raises:
        FileNotFoundError: there is no store at ``path``.
        ValueError: the file does not describe a store of this version, or was changed after writing.
    """
    file = Path(path) / META_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no sequences at {path}: make them with python -m preprocess.chunk_documents")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): make the store again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise ValueError(f"{file} does not describe {FORMAT} of version {VERSION}: make the store again")
    if meta.get("identity") != identity_of(meta):
        raise ValueError(f"{file} was changed after it was written: make the store again")
    return meta
