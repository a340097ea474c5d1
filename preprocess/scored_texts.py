"""Texts that an evaluation scores document by document: files, corpora, data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.corpus import TokenCorpus, open_corpus
from datamodules.corpus_format import META_FILE, digest
from preprocess.arxiv_math import ARXIV, HUB_FILES
from preprocess.arxiv_math import HUB_NAME as PROOF_PILE
from preprocess.documents import TEXT_COLUMN, VALIDATION, ReadOptions, Source
from preprocess.hub import HUB_PREFIX, HubSource
from preprocess.sources import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RawTexts:
    """Documents of a source of text, tokenised as they are read.

    Attributes:
        name: what reports call it.
        identity: changes whenever the documents do.
    """

    def __init__(self, source: Source, name: str | None = None):
        self.source, self.name = source, name or source.name
        self.identity = digest(source.describe())

    def documents(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
        """Yield the token ids of each document, without special tokens."""
        for document in self.source.documents():
            # A whole book exceeds what the tokenizer says its model takes; it would warn each time.
            yield tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]


class CorpusTexts:
    """Documents of a token corpus, without their end-of-text tokens.

    Attributes:
        name: what reports call it.
        identity: that of the corpus.
    """

    def __init__(self, corpus: TokenCorpus, name: str | None = None):
        self.corpus, self.identity = corpus, corpus.identity
        self.name = name or f"{corpus.path.parent.name}/{corpus.path.name}"

    def documents(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
        """Yield the token ids of each document.

        Raises:
            ValueError: the corpus was made with another tokenizer.
        """
        if self.corpus.made_by(tokenizer) is False:
            raise ValueError(
                f"the corpus {self.corpus.path} was made with another tokenizer than the model's: give its raw text"
            )
        end = self.corpus.eos_token_id
        for index in range(self.corpus.num_documents):
            tokens = self.corpus.document(index).tolist()
            yield tokens[:-1] if tokens and tokens[-1] == end else tokens


def open_texts(
    path: str | list[str],
    *,
    name: str | list[str] | None = None,
    split: str | None = None,
    text_column: str = TEXT_COLUMN,
    where: str | None = None,
) -> list[RawTexts | CorpusTexts]:
    """Open one or several texts to score.

    Args:
        path: files or folders of text (json lines, parquet, plain), corpus folders, ``hub:NAME[:config]``,
            ``python_stdlib``. Of ``hub:hoskinson-center/proof-pile`` the arXiv part is read.
        name: what reports call them; None: their own names.
        split: documents of one split; None: ``validation`` of corpora and of the hub, everything of files.
        text_column: column (parquet, hub) or key (json lines) of the text.
        where: keep only rows with this value, as ``key.key=value``.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: nothing readable there, or other numbers of names than of texts.
    """
    paths = [path] if isinstance(path, str) else path
    names: Sequence[str | None] = [name] if isinstance(name, str) else name or [None] * len(paths)
    if not paths or len(names) != len(paths):
        raise ValueError(f"data.path and data.name must be as many, at least one, got {len(paths)} and {len(names)}")
    reading = ReadOptions(text_column=text_column, where=where, splits=(split,) if split else ())
    texts = [_open(place, label, reading) for place, label in zip(paths, names, strict=True)]
    labels = [text.name for text in texts]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the texts need different names, got {', '.join(labels)}: pass data.name=[...]")
    return texts


def _open(path: str, name: str | None, reading: ReadOptions) -> RawTexts | CorpusTexts:
    folder = Path(path)
    if (folder / META_FILE).is_file() or any(folder.glob(f"*/{META_FILE}")):
        split = reading.splits[0] if reading.splits else VALIDATION
        return CorpusTexts(open_corpus(folder, split=split), name)
    return RawTexts(_source(path, reading), name)


def _source(path: str, reading: ReadOptions) -> Any:
    if not path.startswith(HUB_PREFIX):
        return open_source(path, reading)
    held_out = replace(reading, splits=reading.splits or (VALIDATION,))
    if path.removeprefix(HUB_PREFIX).split(":")[0] == PROOF_PILE:
        return HubSource(PROOF_PILE, replace(held_out, where=reading.where or ARXIV), json_lines=HUB_FILES)
    return open_source(path, held_out)
