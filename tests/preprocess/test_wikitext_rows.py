"""WikiText as raw lines, json lines and parquet: one token stream, the same blocks."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.corpus import open_split
from datamodules.sentinel_blocks import Blocks
from preprocess.documents import ReadOptions, split_of_name
from preprocess.job import Work, tokenize
from preprocess.progress import TokenizeProgress
from preprocess.sources import open_source

RAW = " \n = A title = \n \n Some words , and @-@ more . \n Another line \n \n"
ROWS = ["", " = A title = \n", "", " Some words , and @-@ more . \n", " Another line \n", ""]


def folders(tmp_path):
    for name in ("raw", "json", "parquet"):
        (tmp_path / name).mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "raw" / f"wiki.{split}.raw").write_text(RAW)
        (tmp_path / "json" / f"{split}.json").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
        pq.write_table(pa.table({"text": ROWS}), tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    return [tmp_path / name for name in ("raw", "json", "parquet")]


def test_all_forms_have_the_same_rows_and_blocks(tmp_path):
    streams = []
    for folder in folders(tmp_path):
        rows = {}
        for document in open_source(folder).documents():
            rows.setdefault(document.split, []).append(document.text)
        assert rows == dict.fromkeys(("test", "train", "validation"), ROWS)
        work = Work(open_source(folder), "bytes", folder / "corpus", append_eos=False)
        with TokenizeProgress("text", 3) as progress:
            tokenize(work, progress)
        corpus = open_split(folder / "corpus", "test")
        blocks = Blocks(corpus, 16)
        streams.append([corpus.read(0, len(corpus)).tolist(), [blocks[i].tolist() for i in range(len(blocks))]])
    assert streams[0] == streams[1] == streams[2]
    assert bytes(streams[0][0]).decode() == "".join(ROWS)
    assert len(streams[0][1]) == len("".join(ROWS)) // 16


def test_names_of_wikitext_and_c4_say_their_split():
    assert split_of_name("wiki.valid.raw") == "validation"
    assert split_of_name("c4-train.00000-of-01024.json.gz") == "train"
    assert split_of_name("the-test-of-time.txt") is None and split_of_name("wiki.trains.raw") is None


def test_a_raw_file_has_no_columns_and_reads_on_from_a_row(tmp_path):
    path = tmp_path / "wiki.train.raw"
    path.write_text(RAW)
    source = open_source(path)
    assert [document.text for document in source.documents(row=4)] == ROWS[4:]
    with pytest.raises(ValueError, match="is plain text"):
        list(open_source(path, ReadOptions(text_column="body")).documents())
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(ValueError, match=r"wiki\.train\.raw line 2: byte 0xff"):
        list(open_source(path).documents())
