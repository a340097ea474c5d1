"""Reading text: formats, splits, places to go on from, and what is wrong with bad files."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from preprocess.documents import ReadOptions
from preprocess.sources import open_source

TEXTS = ["first\n", "zw\u00f6lf \u6f22", "", "fourth", "fifth " * 50]
NO_SHARE = ReadOptions(validation_fraction=0)


def lines(texts=TEXTS, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        columns = {"short_book_title": [f"book {i}" for i in range(len(texts))], "text": texts}
        pq.write_table(pa.table(columns), path, row_group_size=2)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(texts)))
    elif path.name.endswith(".zst"):
        half = len(texts) // 2
        frames = (lines(texts[:half]), lines(texts[half:]))
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames))
    else:
        path.write_bytes(lines(texts))
    return path


FORMATS = ["x.parquet", "x.jsonl", "x.json", "x.jsonl.gz", "x.jsonl.zst", "x.json.gz"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents_from_any_place(tmp_path, name):
    source = open_source(write(tmp_path / name), NO_SHARE)
    found = list(source.documents())
    assert [document.text for document in found] == TEXTS
    assert [document.num_bytes for document in found] == [len(text.encode()) for text in TEXTS]
    assert [(document.split, document.part, document.row) for document in found] == [("train", 0, i) for i in range(5)]
    for row in range(6):
        assert list(source.documents(0, row)) == found[row:]
    assert list(source.documents(1, 0)) == []


def test_large_string_columns_and_null_texts(tmp_path):
    column = pa.array(["one", None, "three"], pa.large_string())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert [d.text for d in open_source(tmp_path / "x.parquet", NO_SHARE).documents()] == ["one", "", "three"]


def test_a_folder_of_text_is_read_by_name_and_split_by_file(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_bytes(f"text {number}\r\n".encode())
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_text("no")
    source = open_source(tmp_path, ReadOptions(validation_fraction=0.2))
    documents = list(source.documents())
    assert [document.text for document in documents] == [f"text {number}\r\n" for number in range(30)]
    held_out = [document.part for document in documents if document.split == "validation"]
    assert 1 <= len(held_out) <= 12
    (tmp_path / "99.txt").write_text("one more")
    again = open_source(tmp_path, ReadOptions(validation_fraction=0.2)).documents()
    assert [d.part for d in again if d.split == "validation" and d.part < 30] == held_out


def test_a_small_folder_of_text_still_has_validation(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.md").write_text("words")
    source = open_source(tmp_path, ReadOptions(validation_fraction=0.001))
    assert sorted(document.split for document in source.documents()) == ["train", "validation"]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["test.json", "validation.json"], ["test", "validation"]),
        (["train-00000.parquet", "valid-0.parquet", "test_1.parquet"], ["test", "train", "validation"]),
        (["dev/a.jsonl", "test/a.jsonl", "train/a.jsonl"], ["validation", "test", "train"]),
        (["a.jsonl", "val.jsonl"], ["train", "validation"]),
        (["devil.jsonl", "testament.jsonl", "training.jsonl", "VAL.jsonl"], ["validation", "train", "train", "train"]),
    ],
)
def test_splits_by_name(tmp_path, names, splits):
    for name in names:
        write(tmp_path / name, ["text"])
    assert [document.split for document in open_source(tmp_path).documents()] == splits


def test_rows_are_held_out_by_hash_where_names_do_not_say(tmp_path):
    write(tmp_path / "train.jsonl", [f"text {i}" for i in range(200)])
    splits = {d.text: d.split for d in open_source(tmp_path, ReadOptions(validation_fraction=0.1)).documents()}
    assert 8 <= list(splits.values()).count("validation") <= 35
    write(tmp_path / "train.jsonl", [f"text {i}" for i in reversed(range(200))])
    assert splits == {d.text: d.split for d in open_source(tmp_path, ReadOptions(validation_fraction=0.1)).documents()}
    kept = list(open_source(tmp_path, ReadOptions(validation_fraction=0.1, splits=("validation",))).documents())
    assert {d.text for d in kept} == {text for text, split in splits.items() if split == "validation"}


def test_data_files_win_over_the_readme_and_mixtures_are_refused(tmp_path):
    write(tmp_path / "train.parquet", ["text"])
    (tmp_path / "README.md").write_text("about")
    assert open_source(tmp_path).num_parts == 1
    (tmp_path / "train.parquet").rename(tmp_path / "train.json")
    with pytest.raises(ValueError, match="holds both text and"):
        open_source(tmp_path)
    assert [d.text for d in open_source(tmp_path, ReadOptions(suffixes=(".md",))).documents()] == ["about"]


def test_joined_rows_are_one_document(tmp_path):
    source = open_source(write(tmp_path / "test.json"), ReadOptions(join_rows=True))
    (document,) = source.documents()
    assert document.text == "".join(TEXTS) and document.row == 4
    assert list(source.documents(0, 5)) == []


def test_limits_count_per_split_and_hold_when_continued(tmp_path):
    for name in ("train.jsonl", "validation.jsonl"):
        write(tmp_path / name)
    found = list(open_source(tmp_path, limit_documents=2).documents())
    assert [(d.split, d.row) for d in found] == [("train", 0), ("train", 1), ("validation", 0), ("validation", 1)]
    assert list(open_source(tmp_path, limit_documents=2).documents(0, 1)) == found[1:]
    assert list(open_source(tmp_path, limit_documents=2).documents(1, 1)) == found[3:]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        open_source(tmp_path, limit_documents=0)


def test_where_keeps_matching_rows_also_inside_json_text(tmp_path):
    rows = [{"text": "a", "meta": {"config": "arxiv"}}, {"text": "b", "meta": {"config": "books", "x": 1}}]
    rows += [{"text": "c", "meta": json.dumps({"config": "arxiv"})}, {"text": "d"}, {"text": "e", "meta": "no json"}]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = ReadOptions(where="meta.config=arxiv", validation_fraction=0)
    assert [(d.text, d.row) for d in open_source(tmp_path, options).documents()] == [("a", 0), ("c", 2)]
    pq.write_table(pa.table({"text": ["x", "y"], "meta": ['{"config": "arxiv"}', "{}"]}), tmp_path / "x.parquet")
    assert [d.text for d in open_source(tmp_path / "x.parquet", options).documents()] == ["x"]


def test_identity_is_that_of_content_and_options_not_of_the_place(tmp_path):
    first, second = (open_source(write(tmp_path / folder / "x.jsonl").parent).describe() for folder in ("a", "deep/b"))
    assert first == second
    changed = write(tmp_path / "c/x.jsonl", ["forst\n", *TEXTS[1:]]).parent
    assert open_source(changed).describe() != first
    assert open_source(tmp_path / "a", ReadOptions(validation_fraction=0.1)).describe() != first


BAD_FILES = [
    ("x.txt", b"good \xff bad", r"x\.txt: byte 0xff at offset 5 is not UTF-8"),
    ("x.jsonl", lines() + b'{"text": "\xe9"}\n', r"x\.jsonl line 6: byte 0xe9 at offset 450 is not UTF-8"),
    ("x.jsonl", b"{}\n", r"x\.jsonl line 1 has no column text"),
    ("x.jsonl", b'{"text": 1}\n', "holds int, not text"),
    ("x.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    ("x.json", b'[{"text": "a"}]\n', "holds a list: one JSON object per line"),
    ("x.json", b'{\n "text": "a"}\n', r"x\.json line 1 is not JSON"),
    ("x.jsonl.gz", gzip.compress(lines())[:-20], r"x\.jsonl\.gz is damaged"),
    ("x.jsonl.gz", b"no gzip", r"x\.jsonl\.gz is damaged"),
    ("x.jsonl.zst", b"no zstandard", r"x\.jsonl\.zst is damaged"),
    ("x.jsonl", b'{"text": "a", "x": ' + b"[" * 99999 + b"]" * 99999 + b"}\n", r"x\.jsonl line 1 is not JSON"),
    ("x.jsonl", b'\xef\xbb\xbf{"text": "\xe9"}\n', r"x\.jsonl line 1: byte 0xe9 at offset 13 is not UTF-8"),
    ("x.parquet", b"PAR1 no parquet", r"x\.parquet is not a whole parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files_are_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_source(tmp_path / name).documents())


def test_a_byte_order_mark_in_front_of_json_lines_is_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xef\xbb\xbfb"}\n')
    assert [d.text for d in open_source(tmp_path / "x.jsonl", NO_SHARE).documents()] == ["a", "\ufeffb"]


@pytest.mark.parametrize("options", [ReadOptions(where="a=b"), ReadOptions(text_column="body")])
def test_plain_text_has_no_columns_to_choose_among(tmp_path, options):
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match=r"x\.txt is plain text: --where and --text-column"):
        list(open_source(tmp_path / "x.txt", options).documents())


@pytest.mark.parametrize("target", ["nowhere", "folder"])
def test_links_that_would_be_left_out_are_named(tmp_path, target):
    (tmp_path / "text").mkdir()
    (tmp_path / "folder").mkdir()
    for folder in ("text", "folder"):
        (tmp_path / folder / "x.txt").write_text("a")
    (tmp_path / "text/y.txt").symlink_to(tmp_path / "text/x.txt")
    assert open_source(tmp_path / "text").num_parts == 2
    (tmp_path / "text/validation").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="text/validation is a link to a folder or to nothing"):
        open_source(tmp_path / "text")


def test_wrong_bytes_can_be_replaced(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"good \xff bad")
    (tmp_path / "y.jsonl").write_bytes(b'{"text": "\xe9"}\n{"text": "a\\ud800"}\n')
    binary = pa.array([b"ok", b"\xff"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": binary}), tmp_path / "z.parquet")
    options = ReadOptions(errors="replace", validation_fraction=0)
    expected = {"x.txt": ["good \ufffd bad"], "y.jsonl": ["\ufffd", "a" + "\ufffd" * 3]}
    expected["z.parquet"] = ["ok", "\ufffd"]
    for name, texts in expected.items():
        assert [d.text for d in open_source(tmp_path / name, options).documents()] == texts
    with pytest.raises(ValueError, match=r"z\.parquet row 1: byte 0xff at offset 0"):
        list(open_source(tmp_path / "z.parquet").documents())


def test_sources_without_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text at"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no source is named"):
        open_source("")  # not the working directory
    with pytest.raises(ValueError, match="holds no file to read"):
        open_source(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match=r"x\.txt is empty"):
        open_source(tmp_path / "x.txt")
    (tmp_path / "x.bin").write_text("a")
    with pytest.raises(ValueError, match="of no known kind"):
        open_source(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="no column body: choose among"):
        list(open_source(write(tmp_path / "x.parquet"), ReadOptions(text_column="body")).documents())


@pytest.mark.parametrize(
    "options",
    [
        {"validation_fraction": 1},
        {"validation_fraction": float("nan")},
        {"errors": "ignore"},
        {"where": "meta"},
        {"where": "=arxiv"},
        {"splits": ("dev",)},
        {"text_column": ""},
        {"suffixes": (".txt", "")},
    ],
)
def test_impossible_reading_options_are_refused(options):
    with pytest.raises(ValueError, match=r"got|must not be empty"):
        ReadOptions(**options)
