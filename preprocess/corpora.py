"""From whatever ``data.path`` names to a corpus folder that can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from datamodules.corpus_format import digest
from preprocess.documents import ReadOptions
from preprocess.job import Work, corpus_metas, is_trained_here, tokenize, work_identity, work_of
from preprocess.progress import TokenizeProgress
from preprocess.sources import open_source
from preprocess.tokenizers import load_tokenizer, tokenizer_identity


def ensure_corpus(
    path: str | Path,
    *,
    source: str | None = None,
    tokenizer: str | None = None,
    cache: str | Path = "data",
    num_workers: int = 1,
    errors: Literal["strict", "replace"] = "strict",
) -> str:
    """Return a corpus folder for ``path``, tokenising what is not tokenised yet.

    Args:
        path: a corpus folder (checked against ``tokenizer``, whatever it was made from), raw text (a folder or file,
            tokenised into ``cache``), or a folder to make from ``source``.
        source: ``python_stdlib``, raw text or ``hub:NAME``, tokenised into ``path`` where nothing is there.
        tokenizer: as in ``preprocess.tokenize``; None takes what a corpus folder holds.
        cache: where corpora made from raw text go, under a name with their identity.
        num_workers: encoding processes.
        errors: what to do about bytes that are not UTF-8.

    Raises:
        FileNotFoundError: nothing at ``path`` and no ``source``.
        ValueError: the corpus has another tokenizer, or no tokenizer is named for raw text.
    """
    path, options = Path(path), ReadOptions(errors=errors)
    metas = corpus_metas(path)
    if metas:
        _check(path, metas, tokenizer=tokenizer)
        return str(path)
    if not path.exists() and source is None:
        raise FileNotFoundError(f"no corpus and no text at {path}: make it with python -m preprocess.tokenize")
    if tokenizer is None:
        raise ValueError(f"{path} is not tokenised yet: name a tokenizer (bytes, bpe:4096, a folder or a hub name)")
    text = open_source(path if path.exists() or source is None else source, options)
    work = Work(text, tokenizer, path, num_workers=num_workers)
    if path.exists():
        identity = digest(work_identity(work))
        work = Work(text, tokenizer, Path(cache) / f"{text.name}-{identity[:12]}", num_workers=num_workers)
    with TokenizeProgress(text.name, text.num_parts) as progress:
        tokenize(work, progress)
    return str(work.output)


def _check(path: Path, metas: dict[str, dict[str, Any]], *, tokenizer: str | None) -> None:
    made_by = work_of(metas) or {}
    held = {meta["tokenizer"] for meta in metas.values()}
    if len(held) > 1:
        raise ValueError(f"the splits of {path} have different tokenizers: make the corpus again")
    if tokenizer is not None:
        wanted = tokenizer if is_trained_here(tokenizer) else tokenizer_identity(load_tokenizer(tokenizer))
        if wanted not in (*held, made_by.get("tokenizer")):
            raise ValueError(
                f"{path} was not made with the tokenizer {tokenizer}: name the one it has, or make another corpus"
            )
