"""Documents with their summaries on disk: one folder for each split.

A split is a folder of

* ``documents/`` and ``summaries/``: token corpora (``datamodules.corpus_format``), row i of one belongs to row i of the
  other, without end-of-text tokens;
* ``texts.jsonl``: ``{"id", "summary"}`` of each row, what generated text is compared with;
* ``meta.json``: format, counts, tokenizer, marker, and ``identity``, the SHA-256 of everything else in it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datamodules.corpus import TokenCorpus
from datamodules.corpus_format import META_FILE, file_sha256, identity_of
from datamodules.summarization import Alignment, Int64Array, SummaryLayout
from datamodules.tokenizer_identity import tokenizer_identity

FORMAT = "summaries"
VERSION = 1
DOCUMENTS, SUMMARIES, TEXTS_FILE = "documents", "summaries", "texts.jsonl"


class SummaryStore:
    """One split of a folder that ``python -m preprocess.summarization`` made.

    Args:
        path: folder of the split.

    Raises:
        FileNotFoundError: no such split.
        ValueError: a file is missing, cut or not the one that ``meta.json`` describes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = read_summary_meta(self.path)
        self.documents, self.summaries = TokenCorpus(self.path / DOCUMENTS), TokenCorpus(self.path / SUMMARIES)
        found = {DOCUMENTS: self.documents.identity, SUMMARIES: self.summaries.identity}
        counts = {len(self), self.documents.num_documents, self.summaries.num_documents}
        if found != self.meta["corpora"] or len(counts) != 1:
            raise ValueError(f"{self.path} is damaged: its documents and summaries are not those of meta.json")
        self.document_lengths, self.summary_lengths = self.documents.document_lengths, self.summaries.document_lengths

    def __len__(self) -> int:
        return int(self.meta["num_pairs"])

    @property
    def identity(self) -> str:
        """Digest of content and options; checkpoints store it."""
        return str(self.meta["identity"])

    @property
    def marker(self) -> tuple[int, ...]:
        """Tokens between a document and its summary."""
        return tuple(self.meta["marker"])

    @property
    def vocab_size(self) -> int:
        """Every id is smaller than this."""
        return int(self.meta["vocab_size"])

    @property
    def eos_token_id(self) -> int:
        """Ends a summary."""
        return int(self.meta["eos_token_id"])

    def texts(self) -> list[dict[str, str]]:
        """Return ``{"id", "summary"}`` of every row.

        Raises:
            ValueError: the file is not the one that was written.
        """
        file = self.path / TEXTS_FILE
        if not file.is_file() or file_sha256(file) != self.meta["texts"]:
            raise ValueError(f"{file} is missing or was changed after it was written: make the summaries again")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def prompts(
        self,
        count: int,
        *,
        max_length: int,
        max_new_tokens: int,
        chunk_size: int | None,
        alignment: Alignment,
        pad_token_id: int,
    ) -> list[Int64Array]:
        """Return the prompts of the first pairs, int64 ``[P]`` each, with room for a summary of ``max_new_tokens``.

        Raises:
            ValueError: see ``datamodules.summarization.SummaryLayout``.
        """
        layout = SummaryLayout(
            self.marker,
            max_length,
            max_new_tokens,
            chunk_size=chunk_size,
            alignment=alignment,
            pad_token_id=pad_token_id,
            eos_token_id=self.eos_token_id,
        )
        room = layout.prompt_room(max_new_tokens)
        return [layout.prompt(self.documents.document(number), room) for number in range(count)]

    def reference(self, number: int) -> list[int]:
        """Return the tokens of a summary, without its end."""
        tokens: list[int] = self.summaries.document(number).tolist()
        return tokens

    def made_by(self, tokenizer: Any) -> bool:
        """Say whether this is the tokenizer that the store was made with."""
        return str(self.meta["tokenizer"]) == tokenizer_identity(tokenizer)

    def misfit(self, *, vocab_size: int | None, eos_token_ids: Collection[int]) -> str:
        """Say why a model cannot read this store; empty if nothing known speaks against it."""
        if vocab_size is not None and self.vocab_size > vocab_size:
            return f"the summaries have {self.vocab_size} token ids but the model only {vocab_size}"
        if eos_token_ids and self.eos_token_id not in eos_token_ids:
            ends = " or ".join(map(str, eos_token_ids))
            return f"the summaries end with token {self.eos_token_id} but the model's texts with {ends}"
        return ""

    def contains(self, token_id: int) -> bool:
        """Say whether a token occurs."""
        in_text = self.documents.contains(token_id) or self.summaries.contains(token_id)
        return in_text or token_id in (*self.marker, self.eos_token_id)


def open_summaries(path: str | Path, *, split: str) -> SummaryStore:
    """Open one split of a folder.

    Raises:
        FileNotFoundError: no such folder or split; names those that are there.
        ValueError: the split is damaged, or something else.
    """
    if not (Path(path) / split / META_FILE).is_file():
        splits = summary_splits(path)
        found = f"it has {', '.join(splits)}" if splits else "make it with python -m preprocess.summarization"
        raise FileNotFoundError(f"no split {split} of summaries in {path}: {found}")
    return SummaryStore(Path(path) / split)


def summary_splits(path: str | Path) -> list[str]:
    """Return the names of the splits of summaries in a folder."""
    metas = sorted(Path(path).glob(f"*/{META_FILE}"))
    return [meta.parent.name for meta in metas if (meta.parent / DOCUMENTS / META_FILE).is_file()]


def read_summary_meta(path: Path) -> dict[str, Any]:
    """Read and check ``meta.json`` of a split.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not describe summaries of this version, or was changed after writing.
    """
    file = path / META_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no summaries at {path}: make them with python -m preprocess.summarization")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): make the summaries again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise ValueError(
            f"{file} does not describe {FORMAT} of version {VERSION}: make them with python -m preprocess.summarization"
        )
    if meta.get("identity") != identity_of(meta):
        raise ValueError(f"{file} was changed after it was written: make the summaries again")
    return meta
