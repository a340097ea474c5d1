"""The work of tokenising: same bytes for any number of workers, after a kill, and nothing twice."""

import errno
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from datamodules.corpus import TokenCorpus
from preprocess import encode, job
from preprocess.command import run_command
from preprocess.documents import ReadOptions
from preprocess.job import Work, tokenize
from preprocess.journal import WorkFolder
from preprocess.sources import open_source
from preprocess.tokenize import main
from preprocess.tokenizers import byte_tokenizer, load_tokenizer, tokenizer_identity

TEXTS = [f"document {i} " * (i % 7) for i in range(60)]


@pytest.fixture
def source_folder(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:5])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(encode, "GROUP_BYTES", 300)
    monkeypatch.setattr(job, "COMMIT_BYTES", 200)


def make(folder, output, *, tokenizer="bytes", limit_documents=None, **options):
    return Work(open_source(folder, limit_documents=limit_documents), tokenizer, output, **options)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_corpus_folder_holds_every_document_in_order(source_folder, tmp_path):
    outcome = tokenize(make(source_folder, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer", "train", "validation"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    corpus, texts = TokenCorpus(tmp_path / "out/train"), [text for text in TEXTS if text]
    assert outcome.skipped == 10 and not outcome.was_there and not outcome.resumed_at
    assert corpus.num_documents == len(texts) and corpus.num_bytes == sum(map(len, texts))
    assert [corpus.document(i).tolist() for i in range(len(texts))] == [[*text.encode(), 256] for text in texts]
    assert corpus.meta["tokenizer"] == tokenizer_identity(byte_tokenizer()) and corpus.meta["dtype"] == "uint16"
    assert tokenizer_identity(load_tokenizer(tmp_path / "out/tokenizer")) == corpus.meta["tokenizer"]
    assert corpus.meta == outcome.metas["train"]
    assert str(tmp_path) not in json.dumps(outcome.metas)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_workers_change_nothing(source_folder, tmp_path, tokenizer):
    tokenize(make(source_folder, tmp_path / "one", tokenizer=tokenizer))
    tokenize(make(source_folder, tmp_path / "two", tokenizer=tokenizer, num_workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.mark.parametrize("limit_documents", [None, 40])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(source_folder, tmp_path, tokenizer, limit_documents):
    options = {"tokenizer": tokenizer, "limit_documents": limit_documents}
    tokenize(make(source_folder, tmp_path / "whole", **options))
    written = []

    def kill_after(documents, tokens, parts):
        written.append(documents)
        if len(written) == 15:
            raise Killed

    resumed_at = []
    for _ in range(3):
        written.clear()
        with pytest.raises(Killed):
            tokenize(make(source_folder, tmp_path / "out", **options), kill_after)
        assert not (tmp_path / "out").exists()
        (partial,) = tmp_path.glob(".out.*.partial")
        resumed_at.append(written[0])
        for name in ("tokens.bin", "documents.bin"):
            with open(partial / "train" / name, "ab") as file:
                file.write(b"half a docum")
    assert resumed_at == sorted(set(resumed_at))
    assert tokenize(make(source_folder, tmp_path / "out", **options)).resumed_at > 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert list(tmp_path.glob(".out*")) == []


def test_the_same_work_is_not_done_twice(source_folder, tmp_path, monkeypatch):
    tokenize(make(source_folder, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(job, "encode_in_order", lambda *arguments, **options: pytest.fail("encoded again"))
    outcome = tokenize(make(source_folder, tmp_path / "out"))
    assert outcome.was_there and set(outcome.metas) == {"train", "validation"}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_other_work_is_refused_unless_told_to_overwrite(source_folder, tmp_path):
    tokenize(make(source_folder, tmp_path / "out"))
    (source_folder / "train.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(FileExistsError, match="made from other text, tokenizer or options"):
        tokenize(make(source_folder, tmp_path / "out"))
    assert TokenCorpus(tmp_path / "out/train").num_documents > 1
    tokenize(make(source_folder, tmp_path / "out", overwrite=True))
    assert TokenCorpus(tmp_path / "out/train").num_documents == 1
    with pytest.raises(FileExistsError, match="exists and is no corpus"):
        tokenize(make(source_folder, source_folder, overwrite=True))
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out also holds notes\.txt, which would be lost"):
        tokenize(make(source_folder, tmp_path / "out", tokenizer="bpe:280", overwrite=True))
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_full_disk_keeps_what_is_done(source_folder, tmp_path, monkeypatch):
    commit, commits = job.Journal.commit, []

    def fill(journal):
        commits.append(1)
        if len(commits) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(journal)

    with monkeypatch.context() as patch:
        patch.setattr(job.Journal, "commit", fill)
        with pytest.raises(OSError, match=r"no space left for .*run this again"):
            tokenize(make(source_folder, tmp_path / "out"))
    assert tokenize(make(source_folder, tmp_path / "out")).resumed_at > 0


def test_one_process_at_a_time(source_folder, tmp_path):
    work = make(source_folder, tmp_path / "out")
    with (
        WorkFolder(job.work_folder(work, job.work_identity(work))),
        pytest.raises(RuntimeError, match="another process"),
    ):
        tokenize(work)
    assert not tokenize(work).was_there


def test_text_that_looks_like_a_special_token_stays_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a<|endoftext|>b"}\n')
    tokenize(make(tmp_path / "x.jsonl", tmp_path / "out"))
    assert TokenCorpus(tmp_path / "out/train").document(0).tolist() == [*b"a<|endoftext|>b", 256]


def test_empty_text_and_impossible_work_are_refused(source_folder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="x gives no text: 1 empty documents and no other"):
        tokenize(make(tmp_path / "x.jsonl", tmp_path / "out"))
    assert list(tmp_path.glob(".out*")) == []
    with pytest.raises(ValueError, match="workers must be at least 1"):
        make(source_folder, tmp_path / "out", num_workers=0)
    with pytest.raises(ValueError, match="uint16 or uint32"):
        make(source_folder, tmp_path / "out", dtype="int8")
    for tokenizer in ("bpe:big", "bpe:", "bpe:-5"):
        with pytest.raises(ValueError, match="bpe:SIZE"):
            tokenize(make(source_folder, tmp_path / "out", tokenizer=tokenizer))
    with pytest.raises(ValueError, match="259 to 4294967296 entries, got 99999999999999999999"):
        tokenize(make(source_folder, tmp_path / "out", tokenizer=f"bpe:{'9' * 20}"))
    held_out = open_source(source_folder, ReadOptions(splits=("validation",)))
    with pytest.raises(ValueError, match="no training text to learn a tokenizer from"):
        tokenize(Work(held_out, "bpe:280", tmp_path / "out"))
    assert list(tmp_path.glob("*out*")) == []


def test_a_vocabulary_larger_than_the_dtype_is_refused(source_folder, tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "<|endoftext|>", *(f"extra{i}" for i in range(2**16))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "large").mkdir()
    backend.save(str(tmp_path / "large/tokenizer.json"))
    with pytest.raises(ValueError, match="a vocabulary of 65793 does not fit uint16"):
        tokenize(make(source_folder, tmp_path / "out", tokenizer=str(tmp_path / "large"), dtype="uint16"))
    tokenize(make(source_folder, tmp_path / "out", tokenizer=str(tmp_path / "large")))
    assert TokenCorpus(tmp_path / "out/train").meta["dtype"] == "uint32"


def test_the_command(source_folder, tmp_path, capsys):
    arguments = [str(source_folder), "--tokenizer", "bytes", "--output", str(tmp_path / "out"), "--split", "train"]
    assert run_command(main, arguments) == 0
    assert "train: 51 documents" in capsys.readouterr().out and not (tmp_path / "out/validation").exists()
    assert run_command(main, arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert run_command(main, [*arguments, "--no-eos", "--overwrite", "--dtype", "uint32"]) == 0
    corpus = TokenCorpus(tmp_path / "out/train")
    assert corpus.document(0).tolist() == list(TEXTS[1].encode()) and corpus.meta["dtype"] == "uint32"


@pytest.mark.parametrize("change", [["--tokenizer", "/nothing"], ["--limit-documents", "0"], ["--where", "x"]])
def test_a_users_error_is_one_sentence(source_folder, tmp_path, capsys, change):
    arguments = [str(source_folder), "--tokenizer", "bytes", "--output", str(tmp_path / "out"), *change]
    assert run_command(main, arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_undecodable_bytes_leave_no_corpus_until_replaced(tmp_path, capsys):
    (tmp_path / "x.txt").write_bytes(b"abc\xffdef")
    arguments = [str(tmp_path / "x.txt"), "--tokenizer", "bytes", "--output", str(tmp_path / "out")]
    assert run_command(main, arguments) == 2
    assert "byte 0xff at offset 3 is not UTF-8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert run_command(main, [*arguments, "--errors", "replace"]) == 0
    assert TokenCorpus(tmp_path / "out/train").document(0).tolist() == [*"abc\ufffddef".encode(), 256]


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m preprocess.tokenize python_stdlib" in capsys.readouterr().out


def test_options_are_part_of_the_identity(source_folder, tmp_path):
    base = job.work_identity(make(source_folder, tmp_path / "out"))
    assert base == job.work_identity(make(Path(source_folder), tmp_path / "elsewhere", num_workers=5))
    other = Work(open_source(source_folder, ReadOptions(errors="replace")), "bytes", tmp_path / "out")
    assert base != job.work_identity(other)
    assert base != job.work_identity(make(source_folder, tmp_path / "out", tokenizer="bpe:300"))
    assert base != job.work_identity(make(source_folder, tmp_path / "out", append_eos=False))
