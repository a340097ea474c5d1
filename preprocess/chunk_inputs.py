"""Documents as token ids, wherever they come from: text, rows of ids, or a split of a token corpus.

Notable: all three give the documents one after the other, empty ones too, so the number of a document is its place in
the inputs whatever is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from datamodules.corpus import TokenCorpus
from datamodules.corpus_format import META_FILE, file_sha256
from preprocess.chunk_cut import MAX_VOCABULARY
from preprocess.chunk_rows import has_tokens, read_token_rows
from preprocess.documents import ReadOptions
from preprocess.encode import encode_in_order
from preprocess.index import check_ids
from preprocess.sources import open_source

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a store.

    Attributes:
        size: every id is smaller.
        identity: of the tokenizer, None if it is not known.
        backend: content of its ``tokenizer.json``, None if text cannot be encoded.
    """

    size: int
    identity: str | None = None
    backend: str | None = None


class DocumentInput(Protocol):
    """Documents in a fixed order."""

    name: str
    vocabulary: Vocabulary

    def describe(self) -> dict[str, Any]:
        """Return plain values that change whenever the documents do."""

    def documents(self) -> Iterator[Ids]:
        """Yield the ids of every document."""


class TextInput:
    """Raw text of any kind that ``preprocess.tokenize`` reads."""

    def __init__(self, name: str, vocabulary: Vocabulary, *, options: ReadOptions, num_workers: int):
        if vocabulary.backend is None:
            raise ValueError(f"{name} holds text: name the tokenizer that turns it into ids with --tokenizer")
        self.source = open_source(name, options)
        self.name, self.vocabulary, self.num_workers = name, vocabulary, num_workers
        self.backend = vocabulary.backend

    def describe(self) -> dict[str, Any]:
        """Digest of the text and how it is read."""
        return self.source.describe()

    def documents(self) -> Iterator[Ids]:
        """Encode the documents, without special tokens."""
        for document in encode_in_order(self.source.documents(), self.backend, num_workers=self.num_workers):
            yield document.ids


class TokensInput:
    """A column ``tokens`` of a file of json lines or a parquet file."""

    def __init__(self, path: Path, vocabulary: Vocabulary):
        self.path, self.name, self.vocabulary = path, str(path), vocabulary

    def describe(self) -> dict[str, Any]:
        """Digest of the file."""
        return {"kind": "tokens", "sha256": file_sha256(self.path)}

    def documents(self) -> Iterator[Ids]:
        """Take the ids of every row.

        Raises:
            ValueError: a row without ids, or with one that is not in the vocabulary; names the row.
        """
        for place, tokens in read_token_rows(self.path):
            try:
                ids = check_ids(tokens, self.vocabulary.size)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{place}: {error}") from error
            yield ids


class CorpusInput:
    """A split of a token corpus; a document ends with the end-of-text token that the corpus gave it."""

    def __init__(self, path: Path, vocabulary: Vocabulary | None):
        self.corpus, self.name = TokenCorpus(path), str(path)
        self.vocabulary = Vocabulary(self.corpus.vocab_size, self.corpus.meta["tokenizer"])
        if vocabulary is not None and vocabulary.identity not in (None, self.vocabulary.identity):
            raise ValueError(f"{path} was made with another tokenizer than --tokenizer: leave that option out")

    def describe(self) -> dict[str, Any]:
        """Identity of the corpus."""
        return {"kind": "corpus", "identity": self.corpus.identity}

    def documents(self) -> Iterator[Ids]:
        """Read the documents one by one."""
        return (self.corpus.document(number) for number in range(self.corpus.num_documents))


class FirstDocuments:
    """The first documents of another input."""

    def __init__(self, given: DocumentInput, count: int):
        self.given, self.count = given, count
        self.name, self.vocabulary = given.name, given.vocabulary

    def describe(self) -> dict[str, Any]:
        """What the input says of itself, and how many are taken."""
        return {**self.given.describe(), "first": self.count}

    def documents(self) -> Iterator[Ids]:
        """Stop after the first documents."""
        return islice(self.given.documents(), self.count)


def open_input(name: str, vocabulary: Vocabulary | None, *, options: ReadOptions, num_workers: int) -> DocumentInput:
    """Open one ``--input``.

    Args:
        name: a split of a token corpus, a file with a column ``tokens``, or text.
        vocabulary: of the tokenizer the user named; None if none was.
        options: how text is read.
        num_workers: encoding processes.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: text without a tokenizer, a corpus of another one, a corpus folder instead of one of its splits,
            or reading options for something that is no text.
    """
    path = Path(name)
    corpus = is_corpus(path)
    if not corpus and not has_tokens(path):
        return TextInput(name, vocabulary or Vocabulary(MAX_VOCABULARY), options=options, num_workers=num_workers)
    if options != ReadOptions():
        raise ValueError(f"{name} holds token ids: the options of reading text have no effect on it")
    if corpus:
        return CorpusInput(path, vocabulary)
    return TokensInput(path, vocabulary or Vocabulary(MAX_VOCABULARY))


def is_corpus(path: Path) -> bool:
    """Say whether a folder is a split of a token corpus.

    Raises:
        ValueError: it holds such splits, and one of them must be chosen.
    """
    splits = sorted(meta.parent.name for meta in path.glob(f"*/{META_FILE}"))
    if splits:
        raise ValueError(f"{path} is a corpus of several splits: choose one, as in {path / splits[0]}")
    return (path / META_FILE).is_file()
