"""Encode documents in several processes, in order.

Notable: documents are grouped by size and results are taken in the order they were sent, so the number of processes
changes nothing but the time; how many groups wait is bounded, and so is memory.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from preprocess.documents import Document

GROUP_BYTES = 1 << 20
GROUPS_WAITING_PER_WORKER = 2

Ids = npt.NDArray[np.uint32]


class Encoded(NamedTuple):
    """A document as ids; the other fields as in ``Document``."""

    ids: Ids
    num_bytes: int
    split: str
    part: int
    row: int


class Encoder:
    """Encode texts with one thread.

    A text that happens to contain the name of a special token is text: it is not turned into that token.

    Args:
        backend: content of a ``tokenizer.json``.
    """

    def __init__(self, backend: str):
        self.tokenizer = Tokenizer.from_str(backend)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def __call__(self, texts: list[str]) -> list[Ids]:
        """Return the ids of each text."""
        # One text per call: a whole list would start a thread per core in every process.
        encodings = (self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0] for text in texts)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def encode_in_order(documents: Iterable[Document], backend: str, *, num_workers: int) -> Iterator[Encoded]:
    """Encode documents, keeping their order.

    Args:
        documents: read as fast as the workers take them.
        backend: content of a ``tokenizer.json``.
        num_workers: processes; 1 encodes in this one.

    Raises:
        RuntimeError: a worker process died, mostly for lack of memory.
    """
    groups = _groups(documents)
    if num_workers == 1:
        encoder = Encoder(backend)
        for group in groups:
            yield from _with_ids(group, encoder([document.text for document in group]))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(backend,))
    try:
        yield from _encode_in_pool(pool, groups, waiting=num_workers * GROUPS_WAITING_PER_WORKER)
    except BrokenProcessPool as error:
        raise RuntimeError("an encoding process died, mostly for lack of memory: use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_in_pool(pool: ProcessPoolExecutor, groups: Iterator[list[Document]], *, waiting: int) -> Iterator[Encoded]:
    sent: deque[tuple[list[Document], Future[list[Ids]]]] = deque()
    for group in groups:
        future = pool.submit(_encode_in_worker, [document.text for document in group])
        # The texts are with the worker now; what waits here is small.
        sent.append(([document._replace(text="") for document in group], future))
        if len(sent) > waiting:
            done, result = sent.popleft()
            yield from _with_ids(done, result.result())
    for done, result in sent:
        yield from _with_ids(done, result.result())


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += document.num_bytes + 1
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _with_ids(group: list[Document], ids: list[Ids]) -> Iterator[Encoded]:
    for document, document_ids in zip(group, ids, strict=True):
        yield Encoded(document_ids, document.num_bytes, document.split, document.part, document.row)


_worker: dict[str, Any] = {}


def _start_worker(backend: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["encoder"] = Encoder(backend)


def _end_with_parent() -> None:
    """Leave when the parent is gone: killed, it cannot tell its workers, and they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[Ids]:
    return list(_worker["encoder"](texts))
