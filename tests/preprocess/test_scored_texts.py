"""Texts to score: every kind of place gives the same documents, without special tokens."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from preprocess import scored_texts
from preprocess.corpora import ensure_corpus
from preprocess.scored_texts import open_texts
from preprocess.tokenizers import byte_tokenizer

TEXTS = ["the first document", "caf\u00e9 and a second one", "the third"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same documents as json lines, plain and compressed, and as parquet under another column."""
    path = tmp_path_factory.mktemp("texts")
    lines = "".join(json.dumps({"text": text, "kind": number}) + "\n" for number, text in enumerate(TEXTS))
    (path / "plain.jsonl").write_text(lines, encoding="utf-8")
    (path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), path / "table.parquet")
    return path


def decoded(text):
    return [bytes(tokens).decode() for tokens in text.documents(byte_tokenizer())]


def test_files(place):
    plain, packed = open_texts([str(place / "plain.jsonl"), str(place / "packed.jsonl.gz")])
    (table,) = open_texts(str(place / "table.parquet"), name="ours", text_column="body")
    assert decoded(plain) == decoded(packed) == decoded(table) == TEXTS
    assert [plain.name, packed.name, table.name] == ["plain", "packed", "ours"]
    assert len({plain.identity, packed.identity, table.identity}) == 3
    (some,) = open_texts(str(place / "plain.jsonl"), where="kind=2")
    assert decoded(some) == TEXTS[2:]


def test_a_corpus_gives_its_documents_without_their_ends(place, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "source" / split).mkdir(parents=True)
        for number, text in enumerate(TEXTS):
            (tmp_path / "source" / split / f"{number}.txt").write_text(f"{split}: {text}", encoding="utf-8")
    corpus = ensure_corpus(tmp_path / "corpus", source=str(tmp_path / "source"), tokenizer="bytes")
    (held_out,) = open_texts(corpus)
    (train,) = open_texts(corpus, split="train")
    assert decoded(held_out) == [f"validation: {text}" for text in TEXTS] and held_out.name == "corpus/validation"
    assert decoded(train) == [f"train: {text}" for text in TEXTS] and train.identity != held_out.identity
    other = byte_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="made with another tokenizer than the model's: give its raw text"):
        next(held_out.documents(other))


def test_of_the_hub_validation_and_of_proof_pile_the_arxiv_part(monkeypatch):
    opened = []

    class Hub:
        name = "set"

        def __init__(self, name, options, *, json_lines=None):
            opened.append((name, options.splits, options.where, json_lines is not None))

        def describe(self):
            return {"name": opened[-1][0]}

    monkeypatch.setattr(scored_texts, "HubSource", Hub)
    monkeypatch.setattr("preprocess.sources.HubSource", Hub)
    open_texts("hub:deepmind/pg19")
    open_texts("hub:deepmind/pg19", split="test")
    open_texts("hub:hoskinson-center/proof-pile")
    assert opened == [
        ("deepmind/pg19", ("validation",), None, False),
        ("deepmind/pg19", ("test",), None, False),
        ("hoskinson-center/proof-pile", ("validation",), "meta.config=arxiv", True),
    ]


def test_refusals(place):
    file = str(place / "plain.jsonl")
    with pytest.raises(ValueError, match="got 2 and 1"):
        open_texts([file, file], name=["one"])
    with pytest.raises(ValueError, match="need different names, got plain, plain"):
        open_texts([file, file])
    with pytest.raises(FileNotFoundError, match="no text at nowhere"):
        open_texts("nowhere")
    with pytest.raises(ValueError, match="splits are"):
        open_texts(file, split="held-out")
