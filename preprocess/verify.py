"""Check stores against their checksums: python -m preprocess.verify PATH."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from datamodules.corpus import TokenCorpus
from datamodules.corpus_format import DOCUMENTS_FILE, META_FILE, OFFSET_DTYPE, file_sha256
from datamodules.sequence_store import FORMAT as SEQUENCES
from datamodules.sequence_store import SequenceStore
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
    for name, expected in corpus.meta["sha256"].items():
        if file_sha256(corpus.path / name) != expected:
            raise ValueError(f"{corpus.path / name} is damaged: its checksum is not that of meta.json; make it again")
    offsets = np.fromfile(corpus.path / DOCUMENTS_FILE, OFFSET_DTYPE)
    if offsets[0] != 0 or offsets[-1] != len(corpus) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{corpus.path / DOCUMENTS_FILE} does not cut the tokens into documents; make it again")
    return corpus


def verify_sequences(path: Path) -> SequenceStore:
    """Check a store of fixed-length sequences, every one against its hash.

    Raises:
        ValueError: a file or a sequence is damaged; names it.
    """
    store = SequenceStore(path)
    for number in range(len(store)):
        store[number]
    return store


def holds_sequences(path: Path) -> bool:
    """Say whether ``meta.json`` calls the folder a sequence store; a damaged file is the corpus reader's to report."""
    try:
        meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and meta.get("format") == SEQUENCES


def stores_in(path: Path) -> list[Path]:
    """Return the stores at or directly below a path.

    Raises:
        FileNotFoundError: there is none.
    """
    if (path / META_FILE).is_file():
        return [path]
    stores = sorted(meta.parent for meta in path.glob(f"*/{META_FILE}"))
    if not stores:
        raise FileNotFoundError(f"no token corpus and no sequences at {path}: give such a folder, or one of its splits")
    return stores


def verify_tokenizer(folder: Path, corpus: TokenCorpus) -> None:
    """Check that a tokenizer folder holds the tokenizer a corpus was made with.

    Raises:
        ValueError: damaged, or another one.
    """
    if tokenizer_identity(load_tokenizer(folder)) != corpus.meta["tokenizer"]:
        raise ValueError(f"{folder} is damaged or was replaced: {corpus.path} was made with another tokenizer")


def main(arguments: list[str]) -> None:
    """Verify every split of a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.verify",
        description="Check length and checksums of every split of a corpus folder, and its tokenizer; or every "
        "sequence of a sequence store. (Scores: python -m preprocess.score_tokens --verify.)",
        epilog="example: python -m preprocess.verify data/books",
    )
    parser.add_argument("path", type=Path, help="folder of a corpus or of sequences, or one split of it")
    path = parser.parse_args(arguments).path
    for store in stores_in(path):
        if holds_sequences(store):
            sequences = verify_sequences(store)
            print(f"{store}: whole, {len(sequences):,} sequences of {sequences.length:,} tokens")
            continue
        corpus = verify_corpus(store)
        if (path / TOKENIZER_FOLDER).is_dir():
            verify_tokenizer(path / TOKENIZER_FOLDER, corpus)
        print(f"{store}: whole, {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
