"""Tokenise a source into a corpus folder: one resumable, repeatable piece of work.

Notable: the work is named by its identity (text, tokenizer, options). The same work found finished is left alone,
found half done is continued, and gives the same bytes either way, for any number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.corpus_format import META_FILE, digest, read_meta, token_dtype
from preprocess.disk import full_disk_named
from preprocess.documents import SPLITS, TRAIN, Source
from preprocess.encode import encode_in_order
from preprocess.index import check_eos, is_taken, move_into_place, refuse_foreign
from preprocess.journal import Journal, WorkFolder
from preprocess.tokenizers import canonical_backend, load_tokenizer, save_tokenizer, tokenizer_identity
from preprocess.train_bpe import train_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED_PREFIX = "bpe:"
TOKENIZER_FOLDER = "tokenizer"
COMMIT_BYTES = 1 << 24

Report = Callable[[int, int, int], None]
"""Called with documents, tokens and parts done so far."""


@dataclass(frozen=True)
class Work:
    """What is to be tokenised, and how.

    Attributes:
        source: the text.
        tokenizer: ``bytes``, a folder, a file, a hub name, or ``bpe:SIZE`` to train one on the training split first.
        output: corpus folder to make.
        dtype: ``uint16`` or ``uint32``; None takes the smallest that holds the vocabulary.
        append_eos: end every document with the tokenizer's end-of-text token.
        num_workers: encoding processes.
        overwrite: replace another corpus at ``output``.
    """

    source: Source
    tokenizer: str
    output: Path
    dtype: str | None = None
    append_eos: bool = True
    num_workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.num_workers}")
        if self.dtype is not None:
            token_dtype(self.dtype)


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        was_there: the same corpus was there already.
        metas: ``meta.json`` of each split.
        skipped: empty documents left out.
        resumed_at: documents that an earlier, killed run had already written.
    """

    was_there: bool
    metas: dict[str, dict[str, Any]]
    skipped: int = 0
    resumed_at: int = 0


def tokenize(work: Work, report: Report = lambda documents, tokens, parts: None) -> Outcome:
    """Do the work, or what is left of it.

    Raises:
        FileExistsError: another corpus is at ``work.output`` and ``work.overwrite`` is off.
        ValueError: no text, undecodable text, or a vocabulary larger than the dtype.
        OSError: the disk is full; what is done is kept for the next run.
    """
    identity = work_identity(work)
    existing = corpus_metas(work.output)
    if existing and work_of(existing) == identity:
        return Outcome(was_there=True, metas=existing)
    if existing and not work.overwrite:
        raise FileExistsError(
            f"{work.output} holds a corpus made from other text, tokenizer or options: "
            "choose another --output or use --overwrite"
        )
    if not existing and is_taken(work.output):
        raise FileExistsError(f"{work.output} exists and is no corpus: choose another --output or remove it")
    if existing:
        refuse_foreign(work.output, (*SPLITS, TOKENIZER_FOLDER))
    folder = work_folder(work, identity)
    try:
        with full_disk_named(work.output, keeps=folder), WorkFolder(folder) as held:
            outcome = _run(work, identity, folder=folder, report=report)
            held.clear_tools()
            move_into_place(folder, work.output, overwrite=work.overwrite)
    except ValueError:
        # Other text or other options are needed, and those are other work: nothing here will be taken up again.
        shutil.rmtree(folder)
        raise
    return outcome


def work_identity(work: Work) -> dict[str, Any]:
    """Return the plain values that decide every byte of the corpus."""
    tokenizer = work.tokenizer
    if not is_trained_here(tokenizer):
        tokenizer = tokenizer_identity(load_tokenizer(tokenizer))
    identity: dict[str, Any] = {"text": work.source.describe(), "tokenizer": tokenizer}
    return identity | {"dtype": work.dtype, "append_eos": work.append_eos}


def work_folder(work: Work, identity: dict[str, Any]) -> Path:
    """Return the folder, beside the output, where the work is done."""
    return work.output.parent / f".{work.output.name}.{digest(identity)[:12]}.partial"


def is_trained_here(tokenizer: str) -> bool:
    """Say whether a tokenizer name asks for training one."""
    return tokenizer.startswith(TRAINED_PREFIX)


def corpus_metas(path: Path) -> dict[str, dict[str, Any]]:
    """Return ``meta.json`` of every split of a corpus folder; empty if it is none."""
    return {split: read_meta(path / split) for split in SPLITS if (path / split / META_FILE).is_file()}


def work_of(metas: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the identity of the work that made a corpus folder; None if its splits do not belong together."""
    works = []
    for meta in metas.values():
        source = meta["source"] if isinstance(meta["source"], dict) else {}
        works.append({name: value for name, value in source.items() if name != "split"})
    return works[0] if works and all(work == works[0] for work in works) else None


def _run(work: Work, identity: dict[str, Any], *, folder: Path, report: Report) -> Outcome:
    tokenizer = _tokenizer_in(folder / TOKENIZER_FOLDER, work)
    check_eos(tokenizer.eos_token_id, len(tokenizer), append_eos=work.append_eos)
    dtype = work.dtype or ("uint16" if len(tokenizer) <= 1 << 16 else "uint32")
    append = tokenizer.eos_token_id if work.append_eos else None
    journal = Journal(folder, dtype=dtype, vocab_size=len(tokenizer), append=append)
    resumed_at = journal.num_documents
    try:
        _encode_rest(work, journal, backend=canonical_backend(tokenizer), report=report)
        if not journal.num_documents:
            raise ValueError(
                f"{work.source.name} gives no text: {journal.skipped} empty documents and no other; "
                "check --where, --split and --text-column"
            )
        fields = {
            "tokenizer": tokenizer_identity(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "append_eos": work.append_eos,
        }
        metas = {
            split: files.finish(**fields, source={**identity, "split": split})
            for split, files in sorted(journal.files.items())
        }
    finally:
        journal.close()
    return Outcome(was_there=False, metas=metas, skipped=journal.skipped, resumed_at=resumed_at)


def _encode_rest(work: Work, journal: Journal, *, backend: str, report: Report) -> None:
    documents = work.source.documents(journal.part, journal.row)
    uncommitted = 0
    for document in encode_in_order(documents, backend, num_workers=work.num_workers):
        journal.add(document)
        uncommitted += document.num_bytes
        report(journal.num_documents, journal.num_tokens, journal.part)
        if uncommitted >= COMMIT_BYTES:
            journal.commit()
            uncommitted = 0
    journal.commit()


def _tokenizer_in(folder: Path, work: Work) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the work folder; put there by an earlier run or now."""
    if folder.is_dir():
        return load_tokenizer(folder)
    if is_trained_here(work.tokenizer):
        texts = (document.text for document in work.source.documents() if document.split == TRAIN)
        tokenizer = train_bpe(texts, vocab_size=_trained_size(work.tokenizer))
    else:
        tokenizer = load_tokenizer(work.tokenizer)
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    save_tokenizer(tokenizer, partial)
    os.replace(partial, folder)
    return tokenizer


def _trained_size(name: str) -> int:
    size = name.removeprefix(TRAINED_PREFIX)
    if not size.isdigit():
        raise ValueError(f"a tokenizer to train is called {TRAINED_PREFIX}SIZE, as in bpe:4096, got {name}")
    return int(size)
