"""Pairs of documents and summaries from every kind of file to stores; what is wrong with a file is one sentence."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.summary_store import SummaryStore, open_summaries
from preprocess import summary_sources
from preprocess.command import run_command
from preprocess.summarization import ensure_summaries, evaluation_pairs, main
from preprocess.summary_sources import Columns, docstrings, open_pairs

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"document": f"text {n}, of\nlength {n}", "summary": f'sum "{n}"', "id": str(n)} for n in range(5)]


def write(path, rows):
    """Write rows as the kind of file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        kind = pa.ipc.new_file if "feather" in path.name else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.fixture
def call(capsys):
    """Run the command as the shell would."""

    def run(*arguments):
        status = run_command(main, [*map(str, arguments)])
        return status, capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "feather.arrow"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name):
    for columns in (("document", "summary"), ("article", "highlights"), ("body", "abstract")):
        rows = [{columns[0]: r["document"], columns[1]: r["summary"], "id": r["id"]} for r in ROWS]
        path = write(tmp_path / columns[0] / name, rows)
        asked = Columns("body", "abstract") if columns[0] == "body" else Columns()
        pairs = list(open_pairs(path, asked).pairs())
        assert [(p.document, p.summary, p.name) for p in pairs] == [
            (r["document"], r["summary"], r["id"]) for r in ROWS
        ]


def test_splits_come_from_names_or_are_held_out(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", ROWS)
    (tmp_path / "hub" / "dataset_info.json").write_text("{}")  # describes the data
    assert [p.split for p in open_pairs(tmp_path / "hub", Columns()).pairs()][::5] == ["test", "train", "validation"]
    many = [{"document": f"d{n}", "summary": "s"} for n in range(400)]
    splits = [p.split for p in open_pairs(write(tmp_path / "a.jsonl", many), Columns()).pairs()]
    assert 5 < splits.count("validation") < 50 and splits.count("train") == 400 - splits.count("validation")


def test_the_hub_is_streamed_with_its_splits(call, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, name, options):
            self.repository, self.name = name, "news"
            rows = [{"article": f"a{n}", "highlights": f"h{n}", "id": f"i{n}"} for n in range(4)]
            self.streams = {"train": rows, "validation": rows[:2], "test": rows[:1]}

        def describe(self):
            return {"kind": "hub", "name": self.repository, "config": "", "revision": "r", "options": {}}

    monkeypatch.setattr(summary_sources, "HubSource", Hub)
    status, shown = call("hub:org/news", "--tokenizer", "bytes", "--output", tmp_path / "store")
    assert status == 0, shown.err
    stores = {split: open_summaries(tmp_path / "store", split=split) for split in ("train", "validation", "test")}
    assert [len(store) for store in stores.values()] == [4, 2, 1]
    assert stores["train"].texts()[3] == {"id": "i3", "summary": "h3"}
    status, shown = call(
        "hub:org/news", "--tokenizer", "bytes", "--output", tmp_path / "x", "--summary-column", "abstract"
    )
    assert (
        status == 2
        and "org/news train row 0 has no column abstract: name its summary_column (--summary-column) among" in shown.err
    )


def test_the_command_makes_a_store_once(call, tmp_path):
    source, store = write(tmp_path / "train.jsonl", ROWS), tmp_path / "store"
    status, shown = call(source, "--tokenizer", "bytes", "--output", store)
    assert status == 0 and "train: " in shown.out and "done" in shown.out
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert "already there" in call(source, "--tokenizer", "bytes", "--output", store)[1].out
    write(source, ROWS[:4])
    status, shown = call(source, "--tokenizer", "bytes", "--output", store)
    assert status == 2 and "made from other text or options" in shown.err
    assert before == {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert call(source, "--tokenizer", "bytes", "--output", store, "--overwrite")[0] == 0
    assert sum(len(SummaryStore(split)) for split in store.glob("[tv]*") if split.name != "tokenizer") == 4


def test_workers_change_nothing(call, tmp_path):
    source = write(tmp_path / "train.jsonl", ROWS)
    for workers in (1, 2):
        assert call(source, "--tokenizer", "bytes", "--output", tmp_path / str(workers), "--workers", workers)[0] == 0
    metas = [(tmp_path / str(workers) / "train" / "meta.json").read_bytes() for workers in (1, 2)]
    assert metas[0] == metas[1]


BAD = (
    *("columns", "empty", "no document", "number", "cut jsonl", "cut json", "cut csv", "cut parquet", "cut arrow"),
    *("kind", "missing"),
)


def cut(path):
    """Leave out the last third of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def bad_files(folder):
    """Files with something wrong in them, and what is said of it."""
    odd = [*ROWS[:2], {"document": "a", "text": "b"}, *ROWS[3:]]
    return {
        "columns": (write(folder / "columns.jsonl", odd), "columns.jsonl line 3 has no column for the document"),
        "empty": (
            write(folder / "empty.jsonl", [*ROWS, {"document": "a", "summary": " "}]),
            "empty.jsonl line 6 has an empty summary",
        ),
        "no document": (
            write(folder / "void.parquet", [*ROWS, {"document": None, "summary": "a", "id": "x"}]),
            "void.parquet row 5 has an empty document",
        ),
        "number": (write(folder / "n.jsonl", [{"document": "a", "summary": 3}]), "column summary holds int, not text"),
        "cut jsonl": (cut(write(folder / "cut.jsonl", ROWS)), "is not JSON"),
        "cut json": (cut(write(folder / "cut.json", ROWS)), "cut.json is not a whole json array"),
        "cut csv": (cut(write(folder / "cut.csv", ROWS)), "the file is cut or no csv"),
        "cut parquet": (cut(write(folder / "cut.parquet", ROWS)), "cut.parquet is not a whole parquet file"),
        "cut arrow": (cut(write(folder / "cut.arrow", ROWS)), "cut.arrow is not a whole arrow file"),
        "kind": (folder / "pairs.xml", "pairs.xml is of no known kind"),
        "missing": (folder / "nowhere", "no pairs at"),
    }


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_and_leaves_nothing(call, tmp_path, name):
    path, sentence = bad_files(tmp_path / "files")[name]
    if name == "kind":
        path.write_text("<a/>")
    status, shown = call(path, "--tokenizer", "bytes", "--output", tmp_path / "store")
    assert status == 2 and sentence in shown.err and shown.err.count("\n") == 1, shown.err
    assert {entry.name for entry in tmp_path.iterdir()} == {"files"}


def test_bad_rows_can_be_left_out(call, tmp_path):
    rows = [*ROWS, {"document": "", "summary": "a"}, {"document": "a", "summary": "x" * 30}]
    source = write(tmp_path / "train.jsonl", rows)
    options = ("--tokenizer", "bytes", "--max-summary-tokens", "20")
    status, shown = call(source, *options, "--output", tmp_path / "a")
    assert (
        status == 2
        and "line 6 has an empty document; mend it, or leave such rows out with --skip-bad-rows" in shown.err
    )
    source = write(tmp_path / "long.jsonl", [rows[-1]])
    status, shown = call(source, *options, "--output", tmp_path / "a")
    assert status == 2 and "line 1 has a summary of 31 tokens with its end, more than 20" in shown.err
    source = write(tmp_path / "train.jsonl", rows)
    status, shown = call(source, *options, "--output", tmp_path / "a", "--skip-bad-rows")
    assert status == 0 and "2 bad rows left out" in shown.out
    assert call(write(tmp_path / "b.jsonl", rows[5:]), *options, "--skip-bad-rows", "--output", tmp_path / "b")[0] == 2


def test_options_that_make_no_sense(call, tmp_path):
    source = write(tmp_path / "train.jsonl", ROWS)
    for options, sentence in (
        (["--tokenizer", "bpe:300"], "a tokenizer is not trained on summaries"),
        (["--tokenizer", "bytes", "--limit-pairs", "0"], "limit_pairs must be at least 1"),
        (["--tokenizer", "bytes", "--workers", "0"], "num_workers must be at least 1"),
        (["--tokenizer", "./nowhere"], "no tokenizer at"),
    ):
        status, shown = call(source, "--output", tmp_path / "x", *options)
        assert status == 2 and sentence in shown.err, shown.err
    status, shown = call("python_stdlib", "--tokenizer", "bytes", "--output", tmp_path / "x", "--document-column", "a")
    assert status == 2 and "has no columns" in shown.err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").touch()
    status, shown = call(source, "--tokenizer", "bytes", "--output", tmp_path / "x")
    assert status == 2 and "exists and holds no summaries" in shown.err


def test_docstrings_are_taken_out_of_what_they_summarise():
    body = "\n".join(f"    value = value + {n}  # a line of work" for n in range(8))
    source = (
        f'class A:\n    def f(value):\n        """Add up many\n        numbers.\n\n        More."""\n{body}\n'.replace(
            "    value = ", "        value = "
        )
    )
    source += 'def g():\n    """Too short."""\n' + "def h():\n    return 1\n"
    ((line, document, summary),) = docstrings(source)
    assert (line, summary) == (2, "Add up many numbers.")
    assert document.startswith("def f(value):\n    value = value + 0") and '"""' not in document


def test_python_s_library_gives_pairs():
    pairs = []
    for pair in open_pairs("python_stdlib", Columns()).pairs():
        pairs.append(pair)
        if len(pairs) == 40:
            break
    assert all(20 <= len(pair.summary) <= 200 <= len(pair.document) <= 6000 for pair in pairs)
    files = {split: {p.name.split(":")[0] for p in pairs if p.split == split} for split in ("train", "validation")}
    assert files["train"] and not files["train"] & files["validation"]


def test_ensure_makes_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "pairs" / "test.jsonl", ROWS)
    store = ensure_summaries("store", source=str(source), source_path="store", tokenizer="bytes")
    assert ensure_summaries(store) == store == "store"
    assert len(open_summaries(store, split="test")) == 5
    cached = ensure_summaries(source, tokenizer="bytes")
    assert cached.startswith("data/test-") and ensure_summaries(source, tokenizer="bytes") == cached
    assert len(evaluation_pairs(source, split="test", tokenizer="bytes")) == 5
    with pytest.raises(FileNotFoundError, match="or leave the path at store"):
        ensure_summaries("other", source=str(source), source_path="store", tokenizer="bytes")
    with pytest.raises(ValueError, match="name the tokenizer of the model"):
        ensure_summaries(source)


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_that_is_taken_for_a_store(tmp_path):
    source = write(tmp_path / "train.jsonl", ROWS * 20000)
    command = [sys.executable, "-m", "preprocess.summarization", str(source), "--tokenizer", "bytes", "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "store")], cwd=ROOT)
    while not list(tmp_path.glob(".store.*.partial/train/texts.jsonl")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "store").exists()
    for name in ("store", "other"):
        subprocess.run([*command, str(tmp_path / name)], cwd=ROOT, check=True, capture_output=True)
    metas = [(tmp_path / name / "train" / "meta.json").read_bytes() for name in ("store", "other")]
    assert metas[0] == metas[1]
