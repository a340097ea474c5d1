"""From whatever ``data.path`` names to a corpus folder that can be trained on.

Notable: processes that need the same corpus at once (the ranks of a run) wait for the one that makes it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from datamodules.corpus_format import META_FILE, digest
from preprocess.documents import ReadOptions
from preprocess.folders import refuse_output_inside
from preprocess.job import Work, corpus_metas, tokenize, work_identity
from preprocess.progress import TokenizeProgress
from preprocess.sources import open_source


def ensure_corpus(
    path: str | Path,
    *,
    source: str | None = None,
    source_path: str | None = None,
    tokenizer: str | None = None,
    cache: str | Path = "data",
    num_workers: int = 1,
    errors: Literal["strict", "replace"] = "strict",
) -> str:
    """Return a corpus folder for ``path``, tokenising what is not tokenised yet.

    Args:
        path: a corpus folder (taken as it is), raw text (a folder or file, tokenised into ``cache``), or a folder to
            make from ``source``.
        source: ``python_stdlib``, raw text or ``hub:NAME``, tokenised into ``path`` where nothing is there.
        source_path: the only ``path`` that is made from ``source``; None: any.
        tokenizer: for text that is not tokenised yet, as in ``preprocess.tokenize``.
        cache: where corpora made from raw text go, under a name with their identity.
        num_workers: encoding processes.
        errors: what to do about bytes that are not UTF-8.

    Raises:
        FileNotFoundError: nothing at ``path`` and no ``source`` for it.
        ValueError: no tokenizer is named for raw text, or the splits of the corpus have different ones.
    """
    if not str(path):
        raise ValueError("no path is named: give a corpus folder or text")
    path = Path(path)
    is_there = path.exists()
    if (path / META_FILE).is_file():
        raise ValueError(f"{path} is one split of a corpus: name the folder that it lies in")
    if _holds_corpus(path):
        return str(path)
    if source_path is not None and path != Path(source_path):
        source = None
    if not is_there and source is None:
        elsewhere = f", or leave the path at {source_path}" if source_path else ""
        raise FileNotFoundError(
            f"no corpus and no text at {path}: make it with python -m preprocess.tokenize{elsewhere}"
        )
    if tokenizer is None:
        raise ValueError(
            f"{path} holds no corpus: name a tokenizer for its text with prepare.tokenizer=NAME (bytes, bpe:4096, a "
            "folder or a hub name), or make one with python -m preprocess.tokenize"
        )
    text = open_source(path if is_there or source is None else source, ReadOptions(errors=errors))
    work = Work(text, tokenizer, path, num_workers=num_workers)
    if is_there:
        name = f"{text.name}-{digest(work_identity(work))[:12]}"
        work = replace(work, output=Path(cache) / name)
        refuse_output_inside(path, work.output)
    _tokenize_once(work)
    return str(work.output)


def _tokenize_once(work: Work) -> None:
    with held_lock(work.output.with_name(f".{work.output.name}.lock")):
        if not _holds_corpus(work.output):
            with TokenizeProgress(work.source.name, work.source.num_parts) as progress:
                tokenize(work, progress)


@contextmanager
def held_lock(lock: Path) -> Iterator[None]:
    """Hold a lock file, waiting for it; a process that dies lets go of it.

    The file stays: removing it would let two processes hold two files of the same name.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _holds_corpus(path: Path) -> bool:
    metas = corpus_metas(path)
    if len({meta["tokenizer"] for meta in metas.values()}) > 1:
        raise ValueError(f"the splits of {path} have different tokenizers: make the corpus again")
    return bool(metas)
