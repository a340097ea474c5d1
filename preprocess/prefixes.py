"""Prefixes of documents and what follows them, from text of any source or from a token corpus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from datamodules.corpus import open_split
from datamodules.corpus_format import META_FILE
from preprocess.documents import SPLITS, VALIDATION, ReadOptions
from preprocess.sources import open_source
from preprocess.tokenizers import load_tokenizer

WORD = re.compile(r"\S+")


class Prefix(NamedTuple):
    """The beginning of a document and what follows it, as they stand there."""

    text: str
    reference: str


def document_prefixes(
    source: str,
    *,
    split: str | None = None,
    prefix_words: int = 128,
    reference_words: int = 64,
    max_prefixes: int = 200,
    every_words: int | None = None,
    text_column: str = "text",
) -> list[Prefix]:
    """Return the first words of the first documents that are long enough, and the words after them.

    Args:
        source: text (a file, a folder, ``hub:NAME[:config]``, ``python_stdlib``) or a corpus folder, whose tokens its
            own tokenizer turns back into text.
        split: which documents; None: all of a text, those for validation of a corpus.
        prefix_words: words of a prefix; words are what lies between blanks.
        reference_words: words of what follows.
        max_prefixes: prefixes to return at most.
        every_words: of long documents, take a prefix every so many words; None: one of each document.
        text_column: column (parquet, hub) or key (json lines) of the text.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a number below 1, an unknown split, or no document that is long enough.
    """
    if min(prefix_words, reference_words, max_prefixes, every_words or 1) < 1:
        raise ValueError(
            "prefix_words, reference_words, max_prefixes and every_words must be at least 1, "
            f"got {prefix_words}, {reference_words}, {max_prefixes} and {every_words}"
        )
    if split not in (None, *SPLITS):
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    is_corpus = any((Path(source) / name / META_FILE).is_file() for name in SPLITS)
    texts = _corpus_texts(Path(source), split or VALIDATION) if is_corpus else _source_texts(source, split, text_column)
    cuts = (cut for text in texts for cut in cut_words(text, prefix_words, reference_words, every_words=every_words))
    found = list(islice(cuts, max_prefixes))
    if not found:
        raise ValueError(
            f"no document of {source}{f' ({split})' if split else ''} has {prefix_words} + {reference_words} words: "
            "ask for fewer words or another split"
        )
    return found


def cut_words(
    text: str, prefix_words: int, reference_words: int, *, every_words: int | None = None
) -> Iterator[Prefix]:
    """Cut a text after some words, and again after some more; nothing of a text that has fewer.

    Args:
        text: a document.
        prefix_words: words before the first cut.
        reference_words: words between the cuts.
        every_words: begin anew every so many words; None: begin once.
    """
    words = [match.span() for match in WORD.finditer(text)]
    last = len(words) - prefix_words - reference_words
    for first in range(0, last + 1 if every_words is not None else min(last, 0) + 1, every_words or 1):
        middle, end = (words[first + count - 1][1] for count in (prefix_words, prefix_words + reference_words))
        yield Prefix(text[words[first][0] if first else 0 : middle], text[middle:end])


def _source_texts(source: str, split: str | None, text_column: str) -> Iterator[str]:
    splits = () if split is None else (split,)
    opened = open_source(source, ReadOptions(text_column=text_column, validation_fraction=0.0, splits=splits))
    for document in opened.documents():
        yield document.text


def _corpus_texts(folder: Path, split: str) -> Iterator[str]:
    corpus = open_split(folder, split)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    for number in range(corpus.num_documents):
        yield tokenizer.decode(corpus.document(number).tolist(), skip_special_tokens=True)
