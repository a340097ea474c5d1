"""The work of turning documents with their summaries into stores: done once, whole or not at all.

Notable: the same source and options find their stores finished; a killed run is started again from its beginning.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from datamodules.corpus_format import META_FILE, canonical_json, digest, file_sha256, identity_of
from datamodules.summarization import MARKER
from datamodules.summary_store import DOCUMENTS, FORMAT, SUMMARIES, TEXTS_FILE, VERSION, SummaryStore, summary_splits
from preprocess.disk import full_disk_named
from preprocess.documents import SPLITS, Document
from preprocess.encode import Encoder, Ids, encode_in_order
from preprocess.index import CorpusFiles, is_taken, move_into_place, refuse_foreign, write_text
from preprocess.journal import WorkFolder
from preprocess.summary_sources import Pair, PairSource
from preprocess.tokenizers import canonical_backend, load_tokenizer, save_tokenizer, tokenizer_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FOLDER = "tokenizer"

Report = Callable[[int, int, int], None]
"""Called with pairs, tokens and parts done so far."""


@dataclass(frozen=True)
class SummaryWork:
    """What is to be made.

    Attributes:
        source: the pairs.
        tokenizer: ``bytes``, a folder, a file or a hub name.
        output: folder to make.
        max_summary_tokens: a longer summary (its end counted) is a bad row; None: no bound.
        skip_bad_rows: leave out rows without document or summary, or with a summary that is too long, instead of
            stopping at the first.
        num_workers: encoding processes.
        overwrite: replace other summaries at ``output``.
    """

    source: PairSource
    tokenizer: str
    output: Path
    max_summary_tokens: int | None = None
    skip_bad_rows: bool = False
    num_workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_summary_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokenizer.startswith("bpe:"):
            raise ValueError("a tokenizer is not trained on summaries: take that of the model to be fine-tuned")


@dataclass(frozen=True)
class SummaryOutcome:
    """What came of it: ``meta.json`` of each split, the rows left out, and whether all was there already."""

    metas: dict[str, dict[str, Any]]
    skipped: int = 0
    was_there: bool = False


def make_summaries(work: SummaryWork, report: Report = lambda pairs, tokens, parts: None) -> SummaryOutcome:
    """Do the work, or find it done.

    Raises:
        FileExistsError: something else is at ``work.output`` and ``work.overwrite`` is off.
        ValueError: a bad row (names it), no pair at all, or a damaged file.
    """
    tokenizer = load_tokenizer(work.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {work.tokenizer} has no end-of-text token, with which summaries end")
    identity = work_identity(work, tokenizer)
    if is_taken(work.output):
        metas = {split: SummaryStore(work.output / split).meta for split in summary_splits(work.output)}
        if metas and all(meta["source"] == identity for meta in metas.values()):
            return SummaryOutcome(metas, was_there=True)
        if not metas or not work.overwrite:
            held = "holds summaries made from other text or options" if metas else "exists and holds no summaries"
            raise FileExistsError(f"{work.output} {held}: choose another --output{' or use --overwrite' * bool(metas)}")
        refuse_foreign(work.output, (*SPLITS, TOKENIZER_FOLDER))
    folder = work.output.parent / f".{work.output.name}.{identity[:12]}.partial"
    with full_disk_named(work.output), WorkFolder(folder) as held_folder:
        try:
            outcome = _write(work, tokenizer, folder=folder, identity=identity, report=report)
        except ValueError:
            shutil.rmtree(folder)
            raise
        save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        held_folder.clear_tools()
        move_into_place(folder, work.output, overwrite=work.overwrite)
    return outcome


def work_identity(work: SummaryWork, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the digest of what decides every byte of the stores."""
    options = {"max_summary_tokens": work.max_summary_tokens, "skip_bad_rows": work.skip_bad_rows}
    return digest({"pairs": work.source.describe(), "tokenizer": tokenizer_identity(tokenizer), **options})


@dataclass
class _Split:
    """The files of one split while they are written."""

    folder: Path
    format: dict[str, Any]
    corpora: dict[str, CorpusFiles] = field(init=False)
    texts: TextIO = field(init=False)

    def __post_init__(self) -> None:
        for name in (DOCUMENTS, SUMMARIES):
            # What a killed run has left is written anew.
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        self.corpora = {name: CorpusFiles(self.folder / name, **self.format) for name in (DOCUMENTS, SUMMARIES)}
        self.texts = open(self.folder / TEXTS_FILE, "w", encoding="utf-8")  # noqa: SIM115 - closed by finish

    def add(self, pair: Pair, document: Ids, summary: Ids) -> None:
        """Append a pair."""
        self.corpora[DOCUMENTS].add(document, len(pair.document.encode()))
        self.corpora[SUMMARIES].add(summary, len(pair.summary.encode()))
        self.texts.write(json.dumps({"id": pair.name, "summary": pair.summary}) + "\n")

    def finish(self, corpus: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """Close everything and write ``meta.json``; ``corpus`` are the fields of the two corpora."""
        self.texts.flush()
        os.fsync(self.texts.fileno())
        self.texts.close()
        made = {name: files.finish(**corpus, append_eos=False) for name, files in self.corpora.items()}
        meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, **fields}
        meta |= {"num_pairs": made[DOCUMENTS]["num_documents"], "vocab_size": self.format["vocab_size"]}
        meta |= {"corpora": {name: made[name]["identity"] for name in made}}
        meta |= {"num_tokens": {name: made[name]["num_tokens"] for name in made}}
        meta["texts"] = file_sha256(self.folder / TEXTS_FILE)
        meta["identity"] = identity_of(meta)
        write_text(self.folder / META_FILE, canonical_json(meta) + "\n")
        return meta

    def close(self) -> None:
        """Close what is open."""
        self.texts.close()
        for files in self.corpora.values():
            files.close()


def _write(
    work: SummaryWork, tokenizer: PreTrainedTokenizerFast, *, folder: Path, identity: str, report: Report
) -> SummaryOutcome:
    size = len(tokenizer)
    written: dict[str, _Split] = {}
    kind = {"dtype": "uint16" if size <= 1 << 16 else "uint32", "vocab_size": size}
    backend, done, tokens, skipped = canonical_backend(tokenizer), 0, 0, 0
    try:
        for pair, document, summary in _encoded(work.source.pairs(), backend, num_workers=work.num_workers):
            if problem := _problem(pair, len(summary), work.max_summary_tokens):
                if not work.skip_bad_rows:
                    raise ValueError(f"{pair.place} {problem}; mend it, or leave such rows out with --skip-bad-rows")
                skipped += 1
                continue
            if pair.split not in written:
                written[pair.split] = _Split(folder / pair.split, kind)
            written[pair.split].add(pair, document, summary)
            done, tokens = done + 1, tokens + len(document) + len(summary)
            report(done, tokens, 0)
        if not done:
            raise ValueError(f"{work.source.name} gives no pair: {skipped} rows left out and no other")
        marker = [int(token) for text in MARKER for token in Encoder(backend)([text])[0]]
        corpus = {
            "tokenizer": tokenizer_identity(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "source": identity,
        }
        metas = {split: files.finish(corpus, marker=marker, **corpus) for split, files in sorted(written.items())}
    finally:
        for files in written.values():
            files.close()
    return SummaryOutcome(metas, skipped)


def _problem(pair: Pair, summary_length: int, limit: int | None) -> str:
    """Say what is wrong with a pair; empty if nothing is."""
    for role, text in (("document", pair.document), ("summary", pair.summary)):
        if not text.strip():
            return f"has an empty {role}"
    if limit is not None and summary_length + 1 > limit:
        return f"has a summary of {summary_length + 1} tokens with its end, more than {limit}"
    return ""


def _encoded(pairs: Iterator[Pair], backend: str, *, num_workers: int) -> Iterator[tuple[Pair, Ids, Ids]]:
    """Encode both texts of every pair, in order."""
    waiting: deque[Pair] = deque()

    def texts() -> Iterator[Document]:
        for pair in pairs:
            waiting.append(pair)
            for text in (pair.document, pair.summary):
                yield Document(text, len(text.encode()), pair.split, 0, 0)

    encoded = encode_in_order(texts(), backend, num_workers=num_workers)
    for document, summary in zip(encoded, encoded, strict=True):
        yield waiting.popleft(), document.ids, summary.ids
