"""Cut a document into sequences so that every one of its tokens is a target exactly once.

Letters: C tokens of a sequence.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from datamodules.sequence_store import TOKEN_DTYPE, Int32Array
from preprocess.index import check_ids

Tail = Literal["pad", "align", "drop"]
TAILS: tuple[str, ...] = get_args(Tail)
MAX_VOCABULARY = 1 << 31
MAX_LENGTH = 1 << 27


class Chunk(NamedTuple):
    """A stretch of a document.

    Attributes:
        tokens: int32, with the beginning-of-text token in front where there is one.
        offset: number of the first document token, counted without a leading beginning-of-text token.
        first_target: targets at the front that an earlier chunk has counted already.
    """

    tokens: Int32Array
    offset: int
    first_target: int


def chunk_document(
    tokens: npt.ArrayLike,
    length: int,
    *,
    bos_token_id: int | None = None,
    tail: Tail = "pad",
    parity: bool = False,
) -> list[Chunk]:
    """Cut a document into chunks of at most ``length`` tokens, ``length - 1`` targets apart.

    With a beginning-of-text token b: the document without a leading b (if it has one) is d, and chunk k is b followed
    by ``d[k (C - 1) : (k + 1) (C - 1)]``. Without: chunk k is ``d[k (C - 1) : k (C - 1) + C]``, so neighbours share
    the token between them, which the later one only reads.

    Args:
        tokens: ids of the document.
        length: C.
        bos_token_id: token put in front of every chunk.
        tail: what becomes of a rest of fewer than C - 1 targets: ``"pad"`` keeps it as a shorter chunk, ``"align"``
            takes the last full stretch of the document instead (a document that fills no chunk is kept as with pad),
            ``"drop"`` leaves it out.
        parity: cut as the published code does: step C, the first token dropped for a beginning-of-text token whatever
            it is (one token is lost at every border), full chunks only.

    Raises:
        ValueError: an option that cannot be, or ids that are not a flat list of int32 numbers.
    """
    _check(length, bos_token_id, tail=tail, parity=parity)
    document = check_ids(tokens, MAX_VOCABULARY).astype(TOKEN_DTYPE)
    if parity:
        return _published_chunks(document, length, bos_token_id=bos_token_id)
    return _chunks(document, length, bos_token_id=bos_token_id, tail=tail)


def _chunks(document: Int32Array, length: int, *, bos_token_id: int | None, tail: Tail) -> list[Chunk]:
    head = _head(bos_token_id)
    if len(head) and len(document) and document[0] == bos_token_id:
        document = document[1:]
    step, shared = length - 1, 0 if len(head) else 1

    def chunk(offset: int, num_targets: int, first_target: int = 0) -> Chunk:
        stretch = document[offset : offset + num_targets + shared]
        return Chunk(np.concatenate([head, stretch]), offset, first_target)

    num_targets = max(0, len(document) - shared)
    whole, rest = divmod(num_targets, step)
    chunks = [chunk(number * step, step) for number in range(whole)]
    if rest and tail == "align" and whole:
        chunks.append(chunk(num_targets - step, step, step - rest))
    elif rest and tail != "drop":
        chunks.append(chunk(whole * step, rest))
    return chunks


def _published_chunks(document: Int32Array, length: int, *, bos_token_id: int | None) -> list[Chunk]:
    head = _head(bos_token_id)
    document = document[len(head) :]
    size = length - len(head)
    offsets = range(0, len(document) - size + 1, length)
    return [Chunk(np.concatenate([head, document[offset : offset + size]]), offset, 0) for offset in offsets]


def _head(bos_token_id: int | None) -> Int32Array:
    return np.array([] if bos_token_id is None else [bos_token_id], TOKEN_DTYPE)


def _check(length: int, bos_token_id: int | None, *, tail: str, parity: bool) -> None:
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}: a sequence needs a token and a target")
    if length > MAX_LENGTH:
        raise ValueError(f"length must be at most {MAX_LENGTH}, got {length}: every sequence takes as much room")
    if bos_token_id is not None and not 0 <= bos_token_id < MAX_VOCABULARY:
        raise ValueError(f"bos_token_id must be a token id, got {bos_token_id}")
    if tail not in TAILS:
        raise ValueError(f"tail is one of {', '.join(TAILS)}, got {tail}")
    if parity and tail != "drop":
        raise ValueError(f"parity drops what does not fill a sequence: it needs tail='drop', got {tail}")
