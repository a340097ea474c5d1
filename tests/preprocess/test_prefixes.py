"""Prefixes and what follows them: cut at words, from json lines, text and token corpora alike."""

import json

import pytest

from preprocess.corpora import ensure_corpus
from preprocess.prefixes import cut_words, document_prefixes

TEXTS = ["one two\n three  four five six", "too short", "a b c d e f g h i j"]


def test_cuts_keep_the_text_as_it_stands():
    assert list(cut_words(" a  b c\nd e", 2, 2)) == [(" a  b", " c\nd")]
    assert list(cut_words("a b c", 2, 2)) == []
    assert list(cut_words("a b c d", 2, 2)) == [("a b", " c d")]
    cuts = list(cut_words("a b c d e f g h", 2, 2, every_words=2))
    assert cuts == [("a b", " c d"), ("c d", " e f"), ("e f", " g h")]
    assert list(cut_words("a b c", 2, 2, every_words=2)) == []


def test_json_lines_text_and_corpora_give_the_same(tmp_path):
    lines = tmp_path / "c4-validation.00000-of-00008.json"
    lines.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS))
    options = {"prefix_words": 3, "reference_words": 2, "max_prefixes": 5}
    wanted = [("one two\n three", "  four five"), ("a b c", " d e")]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "validation.jsonl").write_text(lines.read_text())
    (folder / "train.jsonl").write_text(lines.read_text())
    assert document_prefixes(str(folder), split="validation", **options) == wanted
    assert document_prefixes(str(folder), **options) == wanted * 2
    corpus = ensure_corpus(str(tmp_path / "corpus"), source=str(folder), tokenizer="bytes")
    assert document_prefixes(corpus, **options) == wanted
    assert document_prefixes(corpus, **options | {"max_prefixes": 1}) == wanted[:1]
    assert document_prefixes(str(lines), **options) == wanted


def test_refusals(tmp_path):
    (tmp_path / "validation.txt").write_text("a b c")
    with pytest.raises(ValueError, match=r"has 128 \+ 64 words"):
        document_prefixes(str(tmp_path))
    with pytest.raises(ValueError, match="split is one of"):
        document_prefixes(str(tmp_path), split="dev")
    with pytest.raises(ValueError, match="at least 1"):
        document_prefixes(str(tmp_path), max_prefixes=0)
    with pytest.raises(FileNotFoundError, match="no text at"):
        document_prefixes(str(tmp_path / "nowhere"))
