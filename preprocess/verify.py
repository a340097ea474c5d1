"""Check stores against their checksums: python -m preprocess.verify PATH."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.corpus import TokenCorpus
from datamodules.corpus_format import DOCUMENTS_FILE, META_FILE, OFFSET_DTYPE, file_sha256
from datamodules.score_store import MANIFEST_FILE
from datamodules.sequence_store import FORMAT as SEQUENCES
from datamodules.sequence_store import SequenceStore, read_sequence_meta
from datamodules.span_scores import FORMAT as SPAN_SCORES
from datamodules.span_scores import read_span_meta, scores_file
from datamodules.summary_store import FORMAT as SUMMARY_PAIRS
from datamodules.summary_store import SummaryStore
from preprocess.command import run_command
from preprocess.job import TOKENIZER_FOLDER
from preprocess.tokenizers import load_tokenizer, tokenizer_identity


def verify_corpus(path: str | Path) -> TokenCorpus:
    """Check length, checksums and document offsets of one token corpus.

    Raises:
        FileNotFoundError: no corpus there.
        ValueError: a file is damaged; names it.
    """
    corpus = TokenCorpus(path)
    check_files(corpus.path, corpus.meta["sha256"])
    offsets = np.fromfile(corpus.path / DOCUMENTS_FILE, OFFSET_DTYPE)
    if offsets[0] != 0 or offsets[-1] != len(corpus) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{corpus.path / DOCUMENTS_FILE} does not cut the tokens into documents; make it again")
    return corpus


def verify_sequences(path: Path) -> SequenceStore:
    """Check a store of fixed-length sequences: its files, and every sequence against its hash.

    Raises:
        ValueError: a file or a sequence is damaged; names it.
    """
    check_files(path, read_sequence_meta(path).get("sha256", {}))  # earlier stores have hashes of sequences only
    store = SequenceStore(path)
    for number in range(len(store)):
        store[number]
    return store


def verify_summaries(path: Path) -> SummaryStore:
    """Check one split of documents with their summaries: both corpora and the texts.

    Raises:
        ValueError: a file is damaged; names it.
    """
    store = SummaryStore(path)
    for corpus in (store.documents, store.summaries):
        verify_corpus(corpus.path)
    store.texts()
    return store


def verify_span_scores(path: Path) -> dict[str, Any]:
    """Check the scores of all splits in a folder; return its ``meta.json``.

    Raises:
        ValueError: a file is damaged; names it.
    """
    meta = read_span_meta(path)
    check_files(path, {scores_file(split): entry["sha256"] for split, entry in meta["splits"].items()})
    return meta


def check_files(folder: Path, sha256: Mapping[str, str]) -> None:
    """Raise ValueError if a file is missing or has another checksum than that of ``meta.json``; names it."""
    for name, expected in sha256.items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != expected:
            raise ValueError(f"{file} is damaged: its checksum is not that of meta.json; make it again")


def verify_tokenizer(folder: Path, store: Path, meta: Mapping[str, Any]) -> None:
    """Check that a tokenizer folder holds the tokenizer a store was made with.

    Raises:
        ValueError: damaged, or another one.
    """
    tokenizer = load_tokenizer(folder)
    ends = meta.get("eos_token_id", tokenizer.eos_token_id)
    if tokenizer_identity(tokenizer) != meta["tokenizer"] or tokenizer.eos_token_id != ends:
        raise ValueError(f"{folder} is damaged or was replaced: {store} was made with another tokenizer")


def verify_store(path: Path) -> tuple[str, Mapping[str, Any]]:
    """Check a store of any kind; return what to say of it and its ``meta.json``."""
    kinds: dict[str | None, Callable[[Path], tuple[str, Mapping[str, Any]]]] = {
        SEQUENCES: _sequences,
        SUMMARY_PAIRS: _summaries,
        SPAN_SCORES: _span_scores,
    }
    # A damaged or unknown file is the corpus reader's to report.
    return kinds.get(format_of(path), _corpus)(path)


def _corpus(path: Path) -> tuple[str, Mapping[str, Any]]:
    corpus = verify_corpus(path)
    return f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens", corpus.meta


def _sequences(path: Path) -> tuple[str, Mapping[str, Any]]:
    store = verify_sequences(path)
    return f"{len(store):,} sequences of {store.length:,} tokens", store.meta


def _summaries(path: Path) -> tuple[str, Mapping[str, Any]]:
    store = verify_summaries(path)
    return f"{len(store):,} documents with summaries", store.meta


def _span_scores(path: Path) -> tuple[str, Mapping[str, Any]]:
    meta = verify_span_scores(path)
    counts = (f"{entry['num_tokens']:,} of {split}" for split, entry in meta["splits"].items())
    return f"scores of tokens, {', '.join(counts)}", meta


def format_of(path: Path) -> str | None:
    """Return what ``meta.json`` calls a folder; None if it cannot be read."""
    try:
        meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = meta.get("format") if isinstance(meta, dict) else None
    return kind if isinstance(kind, str) else None


def stores_in(path: Path) -> list[Path]:
    """Return the stores at or directly below a path.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are scores of sequences, which cannot be checked without these.
    """
    if (path / META_FILE).is_file():
        return [path]
    if (path / MANIFEST_FILE).is_file():
        raise ValueError(
            f"{path} holds scores: check them with python -m preprocess.score_tokens --sequences FOLDER "
            f"--output {path} --verify"
        )
    stores = sorted(meta.parent for meta in path.glob(f"*/{META_FILE}"))
    if not stores:
        raise FileNotFoundError(f"no token corpus and no sequences at {path}: give such a folder, or one of its splits")
    return stores


def main(arguments: list[str]) -> None:
    """Verify every store of a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.verify",
        description="Check the checksums of every split of a corpus folder, of sequences, of summaries, or of scores "
        "of tokens, and the tokenizer beside them. (Scores of sequences: python -m preprocess.score_tokens --verify.)",
        epilog="example: python -m preprocess.verify data/books",
    )
    parser.add_argument("path", type=Path, help="folder of stores, or one of them")
    path = parser.parse_args(arguments).path
    for store in stores_in(path):
        said, meta = verify_store(store)
        if (path / TOKENIZER_FOLDER).is_dir() and meta.get("tokenizer") is not None:
            verify_tokenizer(path / TOKENIZER_FOLDER, store, meta)
        print(f"{store}: whole, {said}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
