"""The token corpus on disk: names, types and the identity that ties a checkpoint to its data.

A corpus is a folder of three files:

* ``tokens.bin``: little-endian uint16 or uint32 token ids of all documents, one after the other;
* ``documents.bin``: little-endian uint64 offsets, ``num_documents + 1`` of them, document i is
  ``tokens[offsets[i] : offsets[i + 1]]``; an end-of-text token belongs to the document it ends;
* ``meta.json``: what the other two are, their SHA-256, and ``identity``, the SHA-256 of everything else in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "token-corpus"
VERSION = 1
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.bin"
META_FILE = "meta.json"
TOKEN_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
OFFSET_DTYPE = "<u8"
META_FIELDS: dict[str, Any] = {
    **{"dtype": str, "num_tokens": int, "num_documents": int, "vocab_size": int},
    **{"eos_token_id": int | None, "sha256": dict, "identity": str},
}


def canonical_json(value: Any) -> str:
    """Write a plain value in the one form that is hashed: sorted keys, no blanks, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """Return the SHA-256 (hexadecimal) of the canonical JSON of a plain value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def identity_of(meta: Mapping[str, Any]) -> str:
    """Return the identity of a corpus: the digest of all fields of ``meta.json`` but ``identity`` itself."""
    return digest({name: value for name, value in meta.items() if name != "identity"})


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 (hexadecimal) of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_dtype(dtype: Any) -> str:
    """Return ``uint16`` or ``uint32`` for a name or numpy type.

    Raises:
        ValueError: any other type.
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    if name not in TOKEN_DTYPES:
        raise ValueError(f"dtype of a token corpus is uint16 or uint32, got {name}")
    return name


def read_meta(path: str | Path) -> dict[str, Any]:
    """Read and check ``meta.json`` of a corpus.

    Raises:
        FileNotFoundError: there is no corpus at ``path``.
        ValueError: the file is not the description of a corpus of this version, or was changed after writing.
    """
    file = Path(path) / META_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no token corpus at {path}: make one with python -m preprocess.tokenize")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): make the corpus again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise ValueError(f"{file} does not describe a {FORMAT} of version {VERSION}: make the corpus again")
    missing = [name for name, kind in META_FIELDS.items() if name not in meta or not isinstance(meta[name], kind)]
    if missing or meta["identity"] != identity_of(meta):
        reason = f"lacks a valid {', '.join(missing)}" if missing else "was changed after it was written"
        raise ValueError(f"{file} {reason}: make the corpus again")
    return meta
