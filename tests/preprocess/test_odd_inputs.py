"""What a user may throw at the commands: one sentence and status 2, or the right result; nothing half done is left."""

import gzip
import json
import os

import pytest
from score_cases import save_llama, save_sequences, score

from datamodules.corpus import TokenCorpus, open_split
from preprocess import chunk_documents, score_tokens, span_scores, summarization, tokenize, train_tokenizer
from preprocess.command import run_command
from preprocess.corpora import ensure_corpus
from preprocess.documents import is_validation

PAIR = {"document": "a b c", "summary": "a"}


@pytest.fixture
def call(tmp_path, capsys):
    """Run a command; words that begin with @ are files of the test, and what is beside them stays as it was."""

    def run(module, *words):
        status = run_command(module.main, [str(word).replace("@", f"{tmp_path}/") for word in words])
        return status, capsys.readouterr()

    return run


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LINE = json.dumps({"text": "abc"}) + "\n"
TEXTS = {
    "empty.txt": (b"", "is empty: nothing to tokenise"),
    "binary.txt": (bytes(range(256)), "byte 0x80 at offset 128 is not UTF-8"),
    "utf16.txt": ("abc".encode("utf-16"), "byte 0xff at offset 0 is not UTF-8"),
    "nul.txt": (b"a\0b", 4),
    "lines.txt": (b"a\r\nb\r\n", 7),
    "one_line.txt": (b"x" * 300_000, 300_001),
    "blank.jsonl": (b"\n\r\n \n", "gives no text"),
    "control.jsonl": (b'{"text": "a\0b"}\n', "line 1 is not JSON"),
    "escaped.jsonl": (b'{"text": "a\\u0000b"}\n', 4),
    "lines.jsonl": (LINE.encode().replace(b"\n", b"\r\n") * 2, 8),
    "cut.jsonl": (LINE.encode() + b'{"text": "de', "line 2 is not JSON"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
    "number.jsonl": (b'{"text": 5}\n', "column text holds int, not text"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "half a surrogate pair at 0"),
    "UPPER.JSONL.GZ": (gzip.compress(LINE.encode()), 4),
    "two.jsonl.gz": (gzip.compress(LINE.encode()) * 2, 8),
    "cut.jsonl.gz": (gzip.compress(LINE.encode() * 999)[:40], "is damaged: Compressed file ended"),
    "not.jsonl.zst": (b"not zstd", "is damaged"),
    "not.parquet": (b"PAR1", "is not a whole parquet file"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name, call, tmp_path):
    content, expected = TEXTS[name]
    write(tmp_path, f"train/{name}", content)
    status, shown = call(tokenize, f"@train/{name}", "--tokenizer", "bytes", "--output", "@out", "--split", "train")
    if isinstance(expected, int):
        assert status == 0 and TokenCorpus(tmp_path / "out" / "train").num_tokens == expected
    else:
        assert status == 2 and expected in shown.err and shown.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["train"]


PAIRS = {
    "half.jsonl": (json.dumps(PAIR | {"document": "\ud800"}), "line 1: column document holds half a surrogate pair"),
    "list.jsonl": (json.dumps(PAIR | {"document": ["a"]}), "column document holds list, not text"),
    "twice.csv": ("document,document,summary\na,b,c\n", "names a column twice: document, document, summary"),
    "ragged.csv": ("document,summary\na,b,c\n", "line 2 has 3 fields, the header 2"),
    "open.csv": ('document,summary\n"a,b\n', "line 2 is not csv"),
    "blank.csv": ("\n", "gives no pair"),
    "empty.csv": ("", "is empty: nothing to read"),
    "cut.json": ("[" + json.dumps(PAIR), "is not a whole json array"),
    "not.arrow": ("ARROW1xx", "is not a whole arrow file"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, call, tmp_path):
    content, expected = PAIRS[name]
    write(tmp_path, name, content)
    status, shown = call(summarization, f"@{name}", "--tokenizer", "bytes", "--output", "@out")
    assert status == 2 and expected in shown.err and shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_column_is_not_both_texts(call, tmp_path):
    write(tmp_path, "a.jsonl", json.dumps(PAIR))
    columns = ["--document-column", "summary", "--summary-column", "summary"]
    status, shown = call(summarization, "@a.jsonl", "--tokenizer", "bytes", "--output", "@out", *columns)
    assert status == 2 and "different columns, got summary for both" in shown.err


IDS = {
    "bom.jsonl": (b'\xef\xbb\xbf{"tokens": [1, 2, 3]}\n', None),
    "negative.jsonl": (b'{"tokens": [-1]}', "token id -1 is not in the vocabulary"),
    "nested.jsonl": (b'{"tokens": [[1, 2]]}', "a flat list of token ids"),
    "truth.jsonl": (b'{"tokens": [true]}', "a flat list of token ids"),
    "text.jsonl": (b'{"tokens": "abc"}', "a flat list of token ids"),
    "empty.jsonl": (b'{"tokens": []}', "1 documents of 0 tokens give no sequence of 4"),
}


@pytest.mark.parametrize("name", IDS)
def test_ids(name, call, tmp_path):
    content, expected = IDS[name]
    write(tmp_path, name, content)
    status, shown = call(chunk_documents, "--input", f"@{name}", "--output", "@out", "--length", 4)
    assert (status, expected is None or expected in shown.err) == (2 if expected else 0, True), shown.err


@pytest.mark.parametrize("length", ["0", "1", str(1 << 40)])
def test_lengths_that_cannot_be(length, call, tmp_path):
    write(tmp_path, "ids.jsonl", '{"tokens": [1, 2, 3]}\n')
    status, shown = call(chunk_documents, "--input", "@ids.jsonl", "--output", "@out", "--length", length)
    assert status == 2 and "length must be at" in shown.err


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (tokenize, ["@text", "--tokenizer", "bytes", "--output", "@text/corpus"]),
        (tokenize, ["@link", "--tokenizer", "bytes", "--output", "@text/sub/corpus"]),
        (train_tokenizer, ["@text", "--vocab-size", "300", "--output", "@text/x"]),
        (chunk_documents, ["--input", "@text", "--tokenizer", "bytes", "--length", "8", "--output", "@text/x"]),
        (summarization, ["@text", "--tokenizer", "bytes", "--output", "@text/x"]),
    ],
)
def test_results_inside_of_what_is_read_are_refused(module, words, call, tmp_path):
    write(tmp_path, "text/train.txt", "abc")
    os.symlink(tmp_path / "text", tmp_path / "link")
    status, shown = call(module, *words)
    assert status == 2 and "lies in the folder that is read" in shown.err
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["train.txt"]


def test_a_cache_inside_of_the_text_is_refused(tmp_path):
    write(tmp_path, "train.txt", "abc")
    with pytest.raises(ValueError, match="lies in the folder that is read"):
        ensure_corpus(tmp_path, tokenizer="bytes", cache=tmp_path / "data")


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_followed(there, call, tmp_path):
    write(tmp_path, "train.txt", "abc")
    if there:
        (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "out")
    command = (tokenize, "@train.txt", "--tokenizer", "bytes", "--output", "@out")
    assert call(*command)[0] == 0 and open_split(tmp_path / "disk", "train").num_tokens == 4
    assert "already there" in call(*command)[1].out
    assert {path.name for path in tmp_path.iterdir()} == {"train.txt", "disk", "out"}


def test_a_single_text_is_there_to_train_on(call, tmp_path):
    # By its hash it would be held out.
    write(tmp_path, "book.txt", next(text for text in map(str, range(1000)) if is_validation(text, 0.05)))
    status, shown = call(tokenize, "@book.txt", "--tokenizer", "bytes", "--output", "@out")
    assert status == 0 and "no validation split" in shown.out and "train: 1 documents" in shown.out


def test_text_that_changes_between_a_kill_and_the_next_run_is_other_work(call, tmp_path, monkeypatch):
    text = write(tmp_path, "text/train_0.txt", "a" * 50)
    write(tmp_path, "text/train_1.txt", "b" * 50)
    command = (tokenize, "@text", "--tokenizer", "bytes", "--output", "@out", "--validation-fraction", 0)

    class Killed(BaseException):
        """Stands for SIGKILL: nobody catches it."""

    def killed(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("preprocess.job.move_into_place", killed)
        with pytest.raises(Killed):
            call(*command)
    text.write_text("c" * 30)
    assert call(*command)[0] == 0
    corpus = open_split(tmp_path / "out", "train")
    assert bytes(corpus.document(0)[:-1].tolist()) == b"c" * 30 and corpus.num_tokens == 82


@pytest.mark.parametrize("place", [0.1, 0.4, 0.7, 1.0])
def test_a_flipped_bit_of_what_a_killed_run_noted_is_named_and_the_work_begins_anew(call, tmp_path, monkeypatch, place):
    write(tmp_path, "train.txt", "a" * 50)
    command = (tokenize, "@train.txt", "--tokenizer", "bytes", "--output", "@out")

    class Killed(BaseException):
        """Stands for SIGKILL: nobody catches it."""

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("preprocess.journal.WorkFolder.clear_tools", killed)
        with pytest.raises(Killed):
            call(*command)
    (journal,) = tmp_path.glob(".out.*.partial/journal.json")
    content = bytearray(journal.read_bytes())
    content[int(place * (len(content) - 2))] ^= 1
    journal.write_bytes(content)
    status, shown = call(*command)
    assert status == 2 and f"{journal} is damaged" in shown.err
    assert call(*command)[0] == 0 and open_split(tmp_path / "out", "train").num_tokens == 51


def test_names_that_are_no_utf8_are_names(call, tmp_path):
    for name, text in ((b"train_caf\xe9.txt", b"abc"), ("train_\u00eb.txt".encode(), b"defg")):
        (tmp_path / "text").mkdir(exist_ok=True)
        with open(os.fsencode(tmp_path / "text") + b"/" + name, "wb") as file:
            file.write(text)
    assert call(tokenize, "@text", "--tokenizer", "bytes", "--output", "@out")[0] == 0
    assert sum(open_split(tmp_path / "out", split).num_tokens for split in ("train", "validation")) == 9


def test_scores_do_not_settle_among_other_files(tmp_path, capsys):
    model, sequences = save_llama(tmp_path / "model"), save_sequences(tmp_path / "sequences")
    before = sorted(path.name for path in sequences.iterdir())
    assert score(sequences, model, sequences) == 2
    assert "and no scores: choose another --output" in capsys.readouterr().err
    assert sorted(path.name for path in sequences.iterdir()) == before


def test_damaged_weights_are_said(tmp_path, capsys, monkeypatch):
    model, sequences = save_llama(tmp_path / "model"), save_sequences(tmp_path / "sequences")
    monkeypatch.setenv("RANK", "first")
    assert score(sequences, model, tmp_path / "scores") == 2
    assert "the environment variable RANK must be a number, got 'first'" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert score(sequences, model, tmp_path / "scores") == 2
    assert f"the weights of {model} are damaged or cut off" in capsys.readouterr().err


def test_a_model_without_a_folder_is_said_before_anything_is_written(call, tmp_path, tiny_corpus):
    for module, words in (
        (span_scores, [tiny_corpus, "--model", "@no/such/model"]),
        (score_tokens, ["--sequences", tiny_corpus, "--model", "@no/such/model"]),
    ):
        assert call(module, *words, "--output", "@out")[0] == 2
    assert not list(tmp_path.iterdir())
