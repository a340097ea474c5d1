"""The command: from ids, text and corpora to a store, the same one wherever the same documents come from."""

import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.corpus import TokenCorpus
from datamodules.sequence_store import SequenceStore
from preprocess.chunk_documents import chunk_document, main
from preprocess.command import run_command
from preprocess.tokenizers import byte_tokenizer, tokenizer_identity

DOCUMENTS = [list(range(1, 1 + size)) for size in (23, 0, 8, 1, 40)]
LENGTH = 8


def write_lines(path, documents=DOCUMENTS, column="tokens"):
    lines = "".join(json.dumps({"id": f"d{i}", column: document}) + "\n" for i, document in enumerate(documents))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def write_parquet(path, documents=DOCUMENTS):
    pq.write_table(pa.table({"id": list(range(len(documents))), "tokens": documents}), path, row_group_size=2)
    return path


def run(*arguments):
    return run_command(main, [str(argument) for argument in arguments])


def make(output, *inputs, options=()):
    assert run("--input", *inputs, "--output", output, "--length", LENGTH, *options) == 0
    return SequenceStore(output)


def error_of(capsys, *arguments):
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ([], {}),
        (["--bos-token-id", 99], {"bos_token_id": 99}),
        (["--tail", "align"], {"tail": "align"}),
        (["--tail", "drop", "--parity"], {"tail": "drop", "parity": True}),
    ],
)
def test_the_folder_is_as_documented(tmp_path, options, cut):
    store = make(tmp_path / "out", write_lines(tmp_path / "in.jsonl"), options=options)
    chunks = [(i, chunk) for i, document in enumerate(DOCUMENTS) for chunk in chunk_document(document, LENGTH, **cut)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "hashes.npy",
        "index.npy",
        "meta.json",
        "tokens.npy",
    ]
    tokens, index, hashes = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("tokens", "index", "hashes"))
    assert tokens.dtype == np.int32 and index.dtype == np.int64 and hashes.dtype == np.uint8
    assert tokens.shape == (len(chunks), LENGTH) and hashes.shape == (len(chunks), 16)
    for row, (document, chunk) in enumerate(chunks):
        size = len(chunk.tokens)
        assert index[row].tolist() == [document, chunk.offset, size, chunk.first_target]
        assert tokens[row, :size].tolist() == chunk.tokens.tolist()
        content = chunk.tokens.astype("<i4").tobytes()
        assert hashes[row].tobytes() == hashlib.blake2b(content, digest_size=16).digest()
    assert len(store) == len(chunks) and store.length == LENGTH and store.bos_token_id == cut.get("bos_token_id")
    assert store.meta["num_targets"] == sum(len(chunk.tokens) - 1 - chunk.first_target for _, chunk in chunks)
    assert store.meta["num_documents"] == 5 and store.meta["max_token_id"] == index_max(tokens, index)
    assert str(tmp_path) not in json.dumps(store.meta)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]


def index_max(tokens, index):
    return max(int(row[:size].max()) for row, size in zip(tokens, index[:, 2], strict=True))


def test_the_same_documents_and_options_give_the_same_id(tmp_path):
    whole = make(tmp_path / "a", write_lines(tmp_path / "in.jsonl"))
    packed = make(tmp_path / "deep/b", write_lines(tmp_path / "in.jsonl.gz"))
    table = make(tmp_path / "c", write_parquet(tmp_path / "in.parquet"))
    first, rest = write_lines(tmp_path / "1.json", DOCUMENTS[:2]), write_lines(tmp_path / "2.json", DOCUMENTS[2:])
    parts = make(tmp_path / "d", first, rest)
    assert whole.store_id == packed.store_id == table.store_id == parts.store_id
    turned = make(tmp_path / "e", rest, first)
    changed = make(tmp_path / "f", write_lines(tmp_path / "3.jsonl", [*DOCUMENTS[:-1], DOCUMENTS[-1][:-1] + [77]]))
    aligned = make(tmp_path / "g", tmp_path / "in.jsonl", options=["--tail", "drop"])
    with_tokenizer = make(tmp_path / "h", tmp_path / "in.jsonl", options=["--tokenizer", "bytes"])
    assert len({store.store_id for store in (whole, turned, changed, aligned, with_tokenizer)}) == 5


def test_text_is_encoded_without_special_tokens(tmp_path):
    texts = ["one <|endoftext|>", "", "a second document, longer"]
    write_lines(tmp_path / "in.jsonl", texts, column="text")
    store = make(tmp_path / "out", tmp_path / "in.jsonl", options=["--tokenizer", "bytes", "--bos-token-id", "256"])
    assert store.meta["tokenizer"] == tokenizer_identity(byte_tokenizer())
    read = {0: [], 2: []}
    for number, (document, _, size, _) in enumerate(store.index):
        tokens = store[number]["input_ids"][:size].tolist()
        assert tokens[0] == 256
        read[document] += tokens[1:]
    assert read == {0: list(texts[0].encode()), 2: list(texts[2].encode())}


def test_text_files_and_folders_are_read_as_by_the_tokeniser(tmp_path):
    (tmp_path / "raw/validation").mkdir(parents=True)
    (tmp_path / "raw/a.txt").write_text("first text file")
    (tmp_path / "raw/b.txt").write_text("second")
    (tmp_path / "raw/validation/c.txt").write_text("held out")
    options = ["--tokenizer", "bytes", "--split", "train"]
    folder = make(tmp_path / "folder", tmp_path / "raw", options=options)
    files = make(tmp_path / "files", tmp_path / "raw/a.txt", tmp_path / "raw/b.txt", options=["--tokenizer", "bytes"])
    assert folder.store_id == files.store_id and folder.meta["num_documents"] == 2
    helped = make(tmp_path / "helped", tmp_path / "raw", options=[*options, "--workers", "2"])
    assert helped.store_id == folder.store_id


def test_a_split_of_a_corpus_gives_its_documents(tmp_path, tiny_corpus):
    store = make(tmp_path / "out", f"{tiny_corpus}/train")
    corpus = TokenCorpus(f"{tiny_corpus}/train")
    assert store.meta["num_documents"] == corpus.num_documents == 10
    assert store.meta["tokenizer"] == corpus.meta["tokenizer"]
    chunks = [chunk for i in range(10) for chunk in chunk_document(corpus.document(i), LENGTH)]
    assert [store[i]["input_ids"][: len(chunk.tokens)].tolist() for i, chunk in enumerate(chunks)] == [
        chunk.tokens.tolist() for chunk in chunks
    ]
    assert make(tmp_path / "same", f"{tiny_corpus}/train", options=["--tokenizer", "bytes"]).store_id == store.store_id


def test_the_same_work_is_not_done_twice_and_other_work_is_refused(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl")
    store = make(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    make(tmp_path / "out", source)
    assert "already there" in capsys.readouterr().out
    arguments = ["--input", source, "--output", tmp_path / "out", "--length", LENGTH, "--tail", "drop"]
    assert "--overwrite" in error_of(capsys, *arguments)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(*arguments, "--overwrite") == 0
    assert SequenceStore(tmp_path / "out").store_id != store.store_id
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").write_text("mine")
    assert "holds no sequences" in error_of(capsys, *arguments[:2], "--output", tmp_path / "other", "--length", 8)
    assert (tmp_path / "other/notes").read_text() == "mine"


def test_a_killed_run_leaves_no_store_and_is_made_good(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        raise Killed

    source = write_lines(tmp_path / "in.jsonl")
    whole = make(tmp_path / "whole", source)
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.chunk_store.SequenceWriter.finish", kill)
        with pytest.raises(Killed):
            run("--input", source, "--output", tmp_path / "out", "--length", LENGTH)
    assert not (tmp_path / "out").exists()
    assert make(tmp_path / "out", source).store_id == whole.store_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "whole"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": [1, -5]}, "line 2 (id x): token id -5"),
        ({"tokens": [1, 2**31]}, "line 2 (id x): token id 2147483648"),
        ({"tokens": "abc"}, "line 2 (id x): a document is a flat list"),
        ({"tokens": None}, "line 2 (id x) has no tokens"),
        ({"text": "abc"}, "line 2 (id x) has no tokens"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, capsys, row, message):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"tokens": [1, 2, 3]}) + "\n" + json.dumps({"id": "x", **row}) + "\n")
    assert message in error_of(capsys, "--input", path, "--output", tmp_path / "out", "--length", 8)
    assert [child.name for child in tmp_path.iterdir()] == ["in.jsonl"]


def test_wrong_parquet_rows_are_named(tmp_path, capsys):
    arguments = ["--output", tmp_path / "out", "--length", 8]
    path = write_parquet(tmp_path / "in.parquet", [[1, 2], None])
    assert "row 1 (id 1) has no tokens" in error_of(capsys, "--input", path, *arguments)
    path.write_bytes(path.read_bytes()[:-8])
    assert "not a whole parquet file" in error_of(capsys, "--input", path, *arguments)
    pq.write_table(pa.table({"tokens": ["a", "b"]}), path)
    assert "row 0: a document is a flat list" in error_of(capsys, "--input", path, *arguments)


def test_impossible_options_are_one_sentence(tmp_path, capsys, tiny_corpus):
    ids, text = write_lines(tmp_path / "ids.jsonl"), write_lines(tmp_path / "text.jsonl", ["words"], column="text")
    short = write_lines(tmp_path / "short.jsonl", [[1], []])
    arguments = ["--output", tmp_path / "out", "--length", 8]
    for inputs, options, message in [
        ([text], [], "--tokenizer"),
        ([ids], ["--length", "1"], "length must be at least 2"),
        ([ids], ["--parity"], "tail='drop'"),
        ([ids], ["--tokenizer", "bytes", "--bos-token-id", "259"], "not in the vocabulary of 259"),
        ([ids], ["--where", "a=b"], "no effect"),
        ([ids], ["--workers", "0"], "workers must be at least 1"),
        ([short], [], "give no sequence of 8"),
        ([tiny_corpus], [], "choose one, as in"),
        ([f"{tiny_corpus}/train", ids], [], "different tokenizers"),
        ([tmp_path / "nothing.jsonl"], ["--tokenizer", "bytes"], "nothing.jsonl"),
        ([tmp_path / "nothing.jsonl"], [], "nothing.jsonl"),
    ]:
        assert message in error_of(capsys, "--input", *inputs, *arguments, *options)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    other = tmp_path / "tokenizer.json"
    byte_tokenizer().backend_tokenizer.save(str(other))
    other.write_text(other.read_text().replace('"Z": 90', '"Z": 91').replace('"[": 91', '"[": 90'))
    message = error_of(capsys, "--input", f"{tiny_corpus}/train", *arguments, "--tokenizer", other)
    assert "another tokenizer" in message
