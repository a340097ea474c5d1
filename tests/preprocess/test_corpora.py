"""From any data path to a corpus folder; and the corpora that have a name."""

import gzip
import json
import multiprocessing
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.corpus import TokenCorpus
from preprocess import arxiv_math, corpora, pg19, python_stdlib
from preprocess.command import run_command
from preprocess.corpora import ensure_corpus
from preprocess.documents import SPLITS, ReadOptions
from preprocess.job import tokenize
from preprocess.python_stdlib import StdlibSource
from preprocess.sources import open_source
from preprocess.tokenize import main as tokenize_command


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("train.txt", "valid.txt"):
        (folder / name).write_text(f"the text of {name}")
    return folder


def test_a_corpus_folder_is_taken_as_it_is(raw, tmp_path):
    path = tmp_path / "corpus"
    assert ensure_corpus(path, source=str(raw), tokenizer="bytes") == str(path)
    (raw / "train.txt").write_text("another text")
    before = TokenCorpus(path / "train").identity
    for options in ({}, {"source": str(raw)}, {"tokenizer": "bpe:270"}, {"source_path": "elsewhere"}):
        assert ensure_corpus(path, **options) == str(path)
    assert TokenCorpus(path / "train").identity == before


def test_splits_of_different_tokenizers_are_no_corpus(raw, tmp_path):
    path = tmp_path / "corpus"
    for tokenizer in ("bytes", "bpe:262"):
        ensure_corpus(tmp_path / tokenizer, source=str(raw), tokenizer=tokenizer)
    path.mkdir()
    (tmp_path / "bytes/train").rename(path / "train")
    (tmp_path / "bpe:262/validation").rename(path / "validation")
    with pytest.raises(ValueError, match="have different tokenizers"):
        ensure_corpus(path)


def test_a_source_bound_to_its_path_fills_no_other(raw, tmp_path):
    home = tmp_path / "home"
    options = {"source": str(raw), "source_path": str(home), "tokenizer": "bytes"}
    with pytest.raises(FileNotFoundError, match=f"no corpus and no text at .*typo.* leave the path at {home}"):
        ensure_corpus(tmp_path / "typo", **options)
    assert not (tmp_path / "typo").exists()
    assert ensure_corpus(f"{home}/", **options) == str(home)
    assert ensure_corpus(raw, cache=tmp_path, **options).startswith(f"{tmp_path}/raw-")


class TestSeveralProcesses:
    """Ranks that need the same corpus at once; processes are forked, so that what is patched here holds there."""

    context = multiprocessing.get_context("fork")

    def start(self, *arguments, **options):
        process = self.context.Process(target=ensure_corpus, args=arguments, kwargs=options)
        process.start()
        return process

    def test_one_prepares_and_the_others_wait(self, raw, tmp_path, monkeypatch):
        path, begun, meet = tmp_path / "corpus", self.context.Value("i", 0), self.context.Barrier(2)
        monkeypatch.setattr(corpora, "open_source", lambda *_: (meet.wait(60) and None) or open_source(raw))

        def counting(work, report):
            with begun.get_lock():
                begun.value += 1
            return tokenize(work, report)

        monkeypatch.setattr(corpora, "tokenize", counting)
        processes = [self.start(path, source=str(raw), tokenizer="bytes") for _ in range(2)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        assert begun.value == 1 and TokenCorpus(path / "train").num_documents == 1

    def test_a_killed_holder_holds_up_nobody(self, raw, tmp_path, monkeypatch):
        path, held, never = tmp_path / "corpus", self.context.Event(), self.context.Event()
        with monkeypatch.context() as patch:
            patch.setattr(corpora, "tokenize", lambda *_: held.set() or never.wait())
            holder = self.start(path, source=str(raw), tokenizer="bytes")
        assert held.wait(60)
        holder.kill()
        holder.join()
        assert ensure_corpus(path, source=str(raw), tokenizer="bytes") == str(path)


def test_raw_text_goes_into_the_cache_once(raw, tmp_path):
    cache = tmp_path / "cache"
    path = ensure_corpus(raw, tokenizer="bytes", cache=cache)
    assert path.startswith(f"{cache}/raw-") and TokenCorpus(f"{path}/validation").num_documents == 1
    assert ensure_corpus(raw, tokenizer="bytes", cache=cache) == path
    (raw / "train.txt").write_text("another text")
    assert ensure_corpus(raw, tokenizer="bytes", cache=cache) != path
    assert ensure_corpus(raw / "train.txt", tokenizer="bytes", cache=cache).startswith(f"{cache}/train-")


def test_what_cannot_be_made_is_refused(raw, tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus and no text at"):
        ensure_corpus(tmp_path / "nothing")
    ensure_corpus(tmp_path / "corpus", source=str(raw), tokenizer="bytes")
    with pytest.raises(ValueError, match="corpus/train is one split of a corpus"):
        ensure_corpus(tmp_path / "corpus/train", tokenizer="bytes")
    with pytest.raises(ValueError, match="no path is named"):
        ensure_corpus("", tokenizer="bytes")  # not the working directory
    with pytest.raises(ValueError, match="name a tokenizer"):
        ensure_corpus(raw)
    with pytest.raises(ValueError, match="not UTF-8"):
        (raw / "train.txt").write_bytes(b"\xff")
        ensure_corpus(raw, tokenizer="bytes", cache=tmp_path)
    assert ensure_corpus(raw, tokenizer="bytes", cache=tmp_path, errors="replace")


def library(root):
    files = {
        "abc.py": "a = 1\n",
        "test/test_abc.py": "no",
        "json/tests/x.py": "no",
        "config-3.13-x86/python-config.py": "no",
        "site-packages/x.py": "no",
        "encodings/cp1.py": "decoding_table = ''",
        "encodings/utf_8.py": "import codecs\n",
        "_sysconfigdata_x.py": "no",
        "old.py": "# -*- coding: latin-1 -*-\nname = '\xe9'\n",
        "notes.txt": "no",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("latin-1"))
    return root


def test_the_library_is_read_without_tests_and_tables(tmp_path):
    source = StdlibSource(ReadOptions(validation_fraction=0.3), library(tmp_path))
    documents = list(source.documents())
    names = [source.names[document.part] for document in documents]
    assert names[:3] == ["abc.py", "encodings/utf_8.py", "old.py"]
    assert all(name.startswith("topics:") for name in names[3:]) and len(names) == source.num_parts
    assert documents[2].text.endswith("'\xe9'\n")
    assert list(source.documents(2, 0)) == documents[2:] and list(source.documents(2, 1)) == documents[3:]


def test_the_split_of_a_file_does_not_depend_on_the_other_files(tmp_path):
    def splits(root):
        source = StdlibSource(ReadOptions(validation_fraction=0.3), root)
        return {source.names[document.part]: document.split for document in source.documents()}

    before = splits(library(tmp_path))
    (tmp_path / "aaa.py").write_text("new = True\n")
    after = splits(tmp_path)
    assert len(after) == len(before) + 1 and before.items() <= after.items()


def test_the_library_of_this_python_has_enough_text_of_both_splits():
    source = open_source(python_stdlib.NAME)
    sizes = {"train": 0, "validation": 0}
    for document in source.documents():
        sizes[document.split] += document.num_bytes
    assert sizes["train"] > 4_000_000 and sizes["validation"] > 100_000
    assert source.describe() == open_source(python_stdlib.NAME).describe()


def test_a_python_without_sources_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python sources in"):
        StdlibSource(ReadOptions(), tmp_path)


class Rows(list):
    """Stands for a streamed split."""

    def skip(self, number):
        return Rows(self[number:])


@pytest.fixture
def fake_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        if arguments[0] == "text":
            lines = [json.dumps({"text": f"t{i}", "meta": {"config": "arxiv" if i % 2 else "books"}}) for i in range(9)]
            return {split: Rows({"text": line} for line in lines) for split in options["data_files"]}
        return {name: Rows({"text": f"{name} {i}"} for i in range(40)) for name in ("test", "train")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name: SimpleNamespace(sha="abc"))
    return asked


def test_hub_rows_are_streamed_at_a_pinned_revision(fake_hub):
    source = open_source("hub:someone/books:english", ReadOptions(validation_fraction=0.2))
    assert fake_hub == [(("someone/books", "english"), {"streaming": True, "revision": "abc"})]
    found = list(source.documents())
    assert [document.text for document in found] == [f"{name} {i}" for name in ("train", "test") for i in range(40)]
    assert {document.split for document in found[:40]} == {"train", "validation"}
    assert {document.split for document in found[40:]} == {"test"}
    assert list(source.documents(0, 39)) == found[39:] and list(source.documents(1, 2)) == found[42:]
    assert source.describe()["revision"] == "abc" and source.name == "books"
    only = open_source("hub:someone/books", ReadOptions(splits=("test",)))
    assert [document.text for document in only.documents()] == [f"test {i}" for i in range(40)]


def test_an_unreachable_hub_is_one_sentence(monkeypatch, tmp_path, capsys):
    def unreachable(api, name):
        raise OSError("no route\nmany more lines")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    arguments = ["hub:someone/books", "--tokenizer", "bytes", "--output", str(tmp_path / "out")]
    assert run_command(tokenize_command, arguments) == 2
    assert capsys.readouterr().err == (
        "error: the hub has no data set someone/books for us (no route): check name and network\n"
    )


def test_arxiv_math_from_the_hub_keeps_arxiv_documents(fake_hub, tmp_path):
    assert run_command(arxiv_math.main, ["--output", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    (arguments, options) = fake_hub[0]
    assert arguments == ("text",) and options["data_files"]["train"].endswith("proof-pile@abc/train/*.jsonl.gz")
    assert TokenCorpus(tmp_path / "out/train").document(1).tolist() == [*b"t3", 256]
    assert [TokenCorpus(tmp_path / "out" / split).num_documents for split in SPLITS] == [4, 4, 4]


def test_arxiv_math_from_a_local_copy(tmp_path):
    """The repository's folders and file names; ``meta`` is an object in some lines, a text with one in others."""
    metas = [{"config": "arxiv", "file": "1.tex"}, {"config": "wiki", "id": 7}, json.dumps({"config": "arxiv"}), {}]
    for name in ("train/proofpile_train_0", "train/proofpile_train_1", "dev/proofpile_dev", "test/proofpile_test"):
        lines = [json.dumps({"text": f"{name[-2:]}{i}", "meta": meta}) for i, meta in enumerate(metas)]
        file = tmp_path / f"raw/{name}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "raw/README.md").write_text("not text to train on")
    arguments = ["--source", str(tmp_path / "raw"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert run_command(arxiv_math.main, arguments) == 0
    corpora_of = {split: TokenCorpus(tmp_path / "out" / split) for split in SPLITS}
    texts = {
        split: [bytes(corpus.document(i)[:-1].tolist()).decode() for i in range(corpus.num_documents)]
        for split, corpus in corpora_of.items()
    }
    assert texts == {"train": ["_00", "_02", "_10", "_12"], "validation": ["ev0", "ev2"], "test": ["st0", "st2"]}


def test_pg19_from_a_local_copy(tmp_path):
    """The repository's parquet files, in their folder and under their names."""
    (tmp_path / "raw/data").mkdir(parents=True)
    for name in (
        "train-00000-of-00002-a1",
        "train-00001-of-00002-b2",
        "validation-00000-of-00001",
        "test-00000-of-00001",
    ):
        columns = {"short_book_title": ["x"], "publication_date": [1900], "url": ["u"], "text": [f"book {name[:11]}"]}
        pq.write_table(pa.table(columns), tmp_path / f"raw/data/{name}.parquet")
    arguments = ["--source", str(tmp_path / "raw"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert run_command(pg19.main, arguments) == 0
    splits = {split: TokenCorpus(tmp_path / "out" / split) for split in SPLITS}
    assert [corpus.num_documents for corpus in splits.values()] == [2, 1, 1]
    assert splits["train"].document(1).tolist() == [*b"book train-00001", 256]
