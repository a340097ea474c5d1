"""The writer of a sequence store (format: ``datamodules.sequence_store``).

Notable: rows go straight to disk behind an array header of fixed size, whose row count is filled in at the end, so
memory is bounded by one document and 48 bytes a sequence.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datamodules.corpus_format import META_FILE, canonical_json, file_sha256, identity_of
from datamodules.sequence_store import (
    FORMAT,
    HASH_SIZE,
    HASHES_ARRAY,
    INDEX_ARRAY,
    INDEX_DTYPE,
    PADDING_TOKEN,
    TOKEN_DTYPE,
    TOKENS_ARRAY,
    VERSION,
    sequence_hash,
    store_id_of,
)
from preprocess.chunk_cut import Chunk
from preprocess.index import write_text


class SequenceWriter:
    """Write the files of a store into an existing folder.

    Args:
        folder: whatever an earlier, killed run left in its files is replaced.
        length: C, tokens of a sequence.
    """

    def __init__(self, folder: Path, length: int):
        self.folder, self.length = folder, length
        self.num_targets, self.max_token_id = 0, -1
        self._index: list[tuple[int, int, int, int]] = []
        self._hashes = bytearray()
        self._tokens: BinaryIO = open(folder / TOKENS_ARRAY, "wb", buffering=1 << 20)  # noqa: SIM115 - closed below
        self._write_header()

    @property
    def num_sequences(self) -> int:
        """Sequences written so far."""
        return len(self._index)

    def add(self, document: int, chunk: Chunk) -> None:
        """Append a chunk of a document."""
        row = np.full(self.length, PADDING_TOKEN, TOKEN_DTYPE)
        row[: len(chunk.tokens)] = chunk.tokens
        self._tokens.write(row.tobytes())
        self._index.append((document, chunk.offset, len(chunk.tokens), chunk.first_target))
        self._hashes += sequence_hash(chunk.tokens)
        self.num_targets += len(chunk.tokens) - 1 - chunk.first_target
        self.max_token_id = max(self.max_token_id, int(chunk.tokens.max()))

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Write what is left; ``fields`` are the options and what else the writer does not know."""
        self._tokens.seek(0)
        self._write_header()
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        self.close()
        index = np.array(self._index, INDEX_DTYPE).reshape(-1, 4)
        hashes = np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, HASH_SIZE)
        for name, array in ((INDEX_ARRAY, index), (HASHES_ARRAY, hashes)):
            with open(self.folder / name, "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "length": self.length, **fields}
        meta |= {"num_sequences": len(index), "num_targets": self.num_targets, "max_token_id": self.max_token_id}
        meta["store_id"] = store_id_of(meta, index, hashes)
        meta["sha256"] = {name: file_sha256(self.folder / name) for name in (TOKENS_ARRAY, INDEX_ARRAY, HASHES_ARRAY)}
        meta["identity"] = identity_of(meta)
        write_text(self.folder / META_FILE, canonical_json(meta) + "\n")
        return meta

    def close(self) -> None:
        """Close the file of the tokens."""
        self._tokens.close()

    def _write_header(self) -> None:
        # numpy leaves room for the largest row count, so the header of a grown array has the same size.
        header = {"descr": TOKEN_DTYPE.str, "fortran_order": False, "shape": (self.num_sequences, self.length)}
        np.lib.format.write_array_header_1_0(self._tokens, header)
