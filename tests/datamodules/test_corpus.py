"""The corpus on disk: written, read back, damaged."""

import json
import pickle

import numpy as np
import pytest

from datamodules import corpus as corpus_module
from datamodules.corpus import open_corpus
from datamodules.corpus_format import canonical_json, file_sha256, identity_of
from datamodules.packed_text import TokenCorpus
from datamodules.tokenizer_identity import tokenizer_identity
from preprocess.index import CorpusWriter
from preprocess.tokenizers import byte_tokenizer
from preprocess.train_bpe import train_bpe

DOCUMENTS = [[5, 6, 7], [], [8], list(range(200, 250))]


def write(path, documents=DOCUMENTS, **options):
    defaults = {"dtype": "uint16", "tokenizer": "sha256:x", "vocab_size": 300, "eos_token_id": 256, "source": "test"}
    with CorpusWriter(path, **(defaults | options)) as writer:
        for document in documents:
            writer.add(document, num_bytes=len(document))
    return TokenCorpus(path)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", np.uint16, np.dtype("uint32")])
def test_round_trip(tmp_path, dtype):
    corpus = write(tmp_path / "corpus", dtype=dtype)
    stream = [token for document in DOCUMENTS for token in [*document, 256]]
    assert len(corpus) == corpus.num_tokens == len(stream)
    assert corpus.num_documents == 4 and corpus.num_bytes == 54 and corpus.vocab_size == 300
    assert corpus.read(0, len(stream)).tolist() == stream and corpus.read(0, 3).dtype == np.int64
    assert [corpus.document(i).tolist() for i in range(4)] == [[*document, 256] for document in DOCUMENTS]
    owners = [i for i, document in enumerate(DOCUMENTS) for _ in range(len(document) + 1)]
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1):
            assert corpus.document_ids(start, stop).tolist() == owners[start:stop]


def test_files_are_as_documented(tmp_path):
    corpus = write(tmp_path / "corpus", append_eos=False)
    tokens = np.fromfile(tmp_path / "corpus/tokens.bin", "<u2")
    assert tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert np.fromfile(tmp_path / "corpus/documents.bin", "<u8").tolist() == [0, 3, 3, 4, 54]
    meta = json.loads((tmp_path / "corpus/meta.json").read_text())
    assert meta["identity"] == identity_of(meta) == corpus.identity
    assert meta["sha256"] == {name: file_sha256(tmp_path / "corpus" / name) for name in ("tokens.bin", "documents.bin")}
    assert {"format": "token-corpus", "version": 1, "source": "test", "append_eos": False}.items() <= meta.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_same_content_same_identity_anywhere(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "deep/b")
    assert first.identity == second.identity
    assert write(tmp_path / "c", source="other").identity != first.identity
    assert write(tmp_path / "d", documents=[*DOCUMENTS, [1]]).identity != first.identity


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        CorpusWriter(
            tmp_path / "corpus", dtype="uint16", tokenizer="t", vocab_size=10, eos_token_id=0, source="s"
        ) as writer,
    ):
        writer.add([1, 2])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_overwrite_only_when_told_and_only_when_complete(tmp_path):
    old = write(tmp_path / "corpus")
    with pytest.raises(FileExistsError, match="overwrite"):
        write(tmp_path / "corpus")
    with pytest.raises(ValueError, match="token id 300"):
        write(tmp_path / "corpus", documents=[[300]], overwrite=True)
    assert TokenCorpus(tmp_path / "corpus").identity == old.identity
    assert write(tmp_path / "corpus", documents=[[1]], overwrite=True).num_tokens == 2
    (tmp_path / "corpus/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt, which would be lost"):
        write(tmp_path / "corpus", overwrite=True)
    assert (tmp_path / "corpus/notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 65537}, "does not fit uint16"),
        ({"dtype": "int32"}, "uint16 or uint32"),
        ({"eos_token_id": None}, "needs an eos_token_id"),
        ({"eos_token_id": 300}, "eos_token_id 300 is not in the vocabulary"),
        ({"documents": [[-1]]}, "token id -1"),
        ({"documents": [[1.5]]}, "flat list"),
        ({"documents": [[[1]]]}, "flat list"),
    ],
)
def test_bad_input_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "corpus", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_id_of_a_dtype_fits(tmp_path):
    assert write(tmp_path / "corpus", vocab_size=65536, documents=[[65535]]).read(0, 1).tolist() == [65535]


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_a_truncated_store_is_refused(tmp_path, name):
    write(tmp_path / "corpus")
    file = tmp_path / "corpus" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        TokenCorpus(tmp_path / "corpus")


def test_changed_or_missing_meta_is_refused(tmp_path):
    write(tmp_path / "corpus")
    file = tmp_path / "corpus/meta.json"
    meta = json.loads(file.read_text())
    file.write_text(canonical_json(meta | {"eos_token_id": 1}))
    with pytest.raises(ValueError, match="was changed"):
        TokenCorpus(tmp_path / "corpus")
    for wrong in ({"num_tokens": None}, {"vocab_size": "300"}, {"sha256": 3}):
        changed = meta | wrong
        file.write_text(canonical_json(changed | {"identity": identity_of(changed)}))
        with pytest.raises(ValueError, match=f"lacks a valid {next(iter(wrong))}"):
            TokenCorpus(tmp_path / "corpus")
    file.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        TokenCorpus(tmp_path / "corpus")
    with pytest.raises(FileNotFoundError, match="no token corpus"):
        TokenCorpus(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 54, 3, 6, 8], [54, 8, 6, 4, 0], [9, 10, 11, 12, 13]])
def test_offsets_that_cut_no_documents_are_refused(tmp_path, offsets):
    corpus = write(tmp_path / "corpus")
    np.array(offsets, "<u8").tofile(tmp_path / "corpus/documents.bin")
    with pytest.raises(ValueError, match=r"documents\.bin is damaged"):
        for start in range(len(corpus)):
            corpus.document_ids(start, len(corpus))


def test_an_empty_corpus_can_be_read(tmp_path):
    corpus = write(tmp_path / "corpus", documents=[])
    assert len(corpus) == corpus.num_documents == len(corpus.read(0, 0)) == len(corpus.document_ids(0, 0)) == 0


def test_ranges_outside_are_refused(tmp_path):
    corpus = write(tmp_path / "corpus")
    for start, stop in [(-1, 2), (0, len(corpus) + 1), (3, 2)]:
        with pytest.raises(ValueError, match="do not lie in"):
            corpus.read(start, stop)
    with pytest.raises(IndexError):
        corpus.document(4)


def test_a_corpus_travels_without_its_maps(tmp_path):
    corpus = write(tmp_path / "corpus", documents=[list(range(256))] * 100)
    corpus.read(0, 5)
    sent = pickle.dumps(corpus)
    assert len(sent) < 2000
    assert pickle.loads(sent).document_ids(255, 259).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("tail", [[], [4, 5]])
def test_a_bare_file_is_read_with_its_documents(tmp_path, tail):
    np.array([1, 2, 0, 3, 0, *tail], "<u2").tofile(tmp_path / "data")
    corpus = pickle.loads(pickle.dumps(TokenCorpus.from_raw(tmp_path / "data", eos_token_id=0)))
    assert corpus.num_documents == 2 + bool(tail) and corpus.num_tokens == 5 + len(tail)
    assert corpus.document(1).tolist() == [3, 0] and corpus.document_ids(1, 4).tolist() == [0, 0, 1]
    assert corpus.vocab_size == (6 if tail else 4) and corpus.eos_token_id == 0
    assert TokenCorpus.from_raw(tmp_path, eos_token_id=0).identity == corpus.identity
    assert TokenCorpus.from_raw(tmp_path, eos_token_id=1).identity != corpus.identity


def test_a_bare_file_of_odd_length_is_refused(tmp_path):
    (tmp_path / "data").write_bytes(b"abc")
    with pytest.raises(ValueError, match="not a multiple"):
        TokenCorpus.from_raw(tmp_path / "data")


def test_a_split_or_a_corpus_of_its_own_is_opened(tmp_path):
    write(tmp_path / "corpus/validation")
    assert open_corpus(tmp_path / "corpus", split="validation").num_documents == 4
    assert open_corpus(str(tmp_path / "corpus/validation"), split="any").num_documents == 4
    with pytest.raises(FileNotFoundError, match=r"no split test in the corpus folder .*corpus: it has validation"):
        open_corpus(tmp_path / "corpus", split="test")
    with pytest.raises(FileNotFoundError, match=r"nowhere: make it with python -m preprocess\.tokenize"):
        open_corpus(tmp_path / "nowhere", split="test")


def test_tokens_in_use_are_found_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "RAW_BLOCK", 3)
    corpus = write(tmp_path / "corpus")
    used = {5, 6, 7, 8, *range(200, 250), 256}
    assert {token for token in range(-2, 400) if corpus.contains(token)} == used
    assert not write(tmp_path / "empty", documents=[]).contains(5)


def test_the_tokenizer_is_known_by_its_identity_only(tmp_path):
    mine, other = byte_tokenizer(), train_bpe(["a b"], vocab_size=260)
    corpus = write(tmp_path / "known", tokenizer=tokenizer_identity(mine))
    assert corpus.made_by(mine) is True and corpus.made_by(other) is False
    assert write(tmp_path / "named", tokenizer="gpt2").made_by(mine) is None


@pytest.mark.parametrize(
    ("vocab_size", "ends", "append_eos", "problem"),
    [
        (None, [], True, ""),
        (300, [256], True, ""),
        (299, [], True, "the corpus has 300 token ids but the model only 299"),
        (1000, [1, 2], True, "the corpus ends documents with token 256 but the model with 1 or 2"),
        (1000, [1, 256], True, ""),
        (1000, [1], False, ""),
    ],
)
def test_what_speaks_against_a_model_is_said(tmp_path, vocab_size, ends, append_eos, problem):
    corpus = write(tmp_path / "corpus", append_eos=append_eos)
    assert corpus.misfit(vocab_size=vocab_size, eos_token_ids=ends) == problem
