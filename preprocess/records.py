"""Rows of one file: plain text, lines of WikiText, json lines (plain, gzip, zstd) and parquet, all streamed.

Notable: bytes that are not UTF-8 are reported with file and place, whatever the format.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from preprocess.documents import TEXT_COLUMN, ReadOptions, matches

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
JSON_SUFFIX, PARQUET_SUFFIX = ".json", ".parquet"
# WikiText as its authors publish it: a row per line, and rows of blanks are empty, as in its json and parquet forms.
RAW_SUFFIX = ".raw"
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *LINES_SUFFIXES, JSON_SUFFIX, PARQUET_SUFFIX, RAW_SUFFIX)
PARQUET_BATCH_ROWS = 16


def suffix_of(path: Path) -> str | None:
    """Return the known ending of a file name, None if there is none."""
    name = path.name.lower()
    return max((suffix for suffix in KNOWN_SUFFIXES if name.endswith(suffix)), key=len, default=None)


def read_rows(path: Path, options: ReadOptions, *, row: int = 0) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of a file from a row on; rows that ``options.where`` excludes are left out.

    Raises:
        ValueError: undecodable bytes, damaged compression, not json lines, no such column; names file and place.
    """
    suffix = suffix_of(path)
    try:
        if suffix in TEXT_SUFFIXES or suffix is None:
            rows = _read_text(path, options, row=row)
        elif suffix == RAW_SUFFIX:
            rows = _read_raw(path, options, row=row)
        elif suffix == PARQUET_SUFFIX:
            rows = _read_parquet(path, options, row=row)
        else:
            rows = _read_lines(path, options, row=row)
        yield from rows
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def decode(content: bytes, place: str, *, errors: str, offset: int = 0) -> str:
    """Decode UTF-8.

    Raises:
        ValueError: bytes that are not UTF-8 and ``errors`` is strict; names ``place`` and the offset.
    """
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: byte 0x{content[error.start]:02x} at offset {offset + error.start} is not UTF-8; "
            "convert the file or use --errors replace"
        ) from error


def text_of(record: dict[str, Any], place: str, *, options: ReadOptions) -> str:
    """Take the text out of a row; null counts as empty.

    Raises:
        ValueError: no such column, not a text, or half of a surrogate pair in it.
    """
    if options.text_column not in record:
        raise ValueError(f"{place} has no column {options.text_column}: choose --text-column among {', '.join(record)}")
    text = record[options.text_column]
    if text is None:
        return ""
    if isinstance(text, bytes):
        return decode(text, place, errors=options.errors)
    if not isinstance(text, str):
        raise ValueError(f"{place}: column {options.text_column} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if options.errors == "strict":
            raise ValueError(f"{place}: half a surrogate pair at {error.start}; use --errors replace") from error
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text


def _read_text(path: Path, options: ReadOptions, *, row: int) -> Iterator[tuple[int, str]]:
    _refuse_columns(path, options)
    if row == 0:
        yield 0, decode(path.read_bytes(), str(path), errors=options.errors)


def _read_raw(path: Path, options: ReadOptions, *, row: int) -> Iterator[tuple[int, str]]:
    _refuse_columns(path, options)
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(file):
            if number >= row:
                text = decode(line, f"{path} line {number + 1}", errors=options.errors)
                yield number, text if text.strip() else ""


def _refuse_columns(path: Path, options: ReadOptions) -> None:
    if options.where is not None or options.text_column != TEXT_COLUMN:
        raise ValueError(f"{path} is plain text: --where and --text-column choose among columns, which it has none of")


def _read_lines(path: Path, options: ReadOptions, *, row: int) -> Iterator[tuple[int, str]]:
    offset = 0
    with _open_lines(path) as file:
        for number, line in enumerate(file):
            content = line if number else line.removeprefix(codecs.BOM_UTF8)
            if number >= row and content.strip():
                place, start = f"{path} line {number + 1}", offset + len(line) - len(content)
                record = parse_line(content, place, errors=options.errors, offset=start)
                if options.where is None or matches(record, options.where):
                    yield number, text_of(record, place, options=options)
            offset += len(line)


def parse_line(line: bytes, place: str, *, errors: str, offset: int = 0) -> dict[str, Any]:
    """Parse a line of JSON.

    Raises:
        ValueError: not UTF-8, or not a JSON object.
    """
    text = decode(line, place, errors=errors, offset=offset)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}): one object per line is expected") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds a {type(record).__name__}: one JSON object per line is expected")
    return record


def _open_lines(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"), 1 << 20)  # type: ignore[arg-type]
    if name.endswith(".zst"):
        return _open_zstd(path)
    return open(path, "rb", buffering=1 << 20)


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"reading {path.name} needs zstandard: pip install zstandard, or unpack the file") from error

    class Stream(io.RawIOBase):
        """Zstandard's reader with its own exception turned into the one of a cut gzip file."""

        def __init__(self, file: BinaryIO):
            self.reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return int(self.reader.readinto(buffer))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error

        def close(self) -> None:
            self.reader.close()
            super().close()

    return io.BufferedReader(Stream(open(path, "rb")), 1 << 20)


def _read_parquet(path: Path, options: ReadOptions, *, row: int) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = _parquet_columns(path, file.schema_arrow.names, options=options)
        groups, number = _groups_from(file, row)
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=columns):
            for record in _with_bytes(batch, options.text_column).to_pylist():
                wanted = options.where is None or matches(record, options.where)
                if number >= row and wanted:
                    yield number, text_of(record, f"{path} row {number}", options=options)
                number += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]})") from error


def _parquet_columns(path: Path, names: list[str], *, options: ReadOptions) -> list[str]:
    wanted = [options.text_column]
    if options.where is not None:
        wanted.append(options.where.split("=")[0].split(".")[0])
    for name in wanted:
        if name not in names:
            raise ValueError(f"{path} has no column {name}: choose among {', '.join(names)}")
    return sorted(set(wanted))


def _groups_from(file: Any, row: int) -> tuple[list[int], int]:
    """Return the row groups that hold row ``row`` and what follows, and the number of their first row."""
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first + rows > row:
            return list(range(group, file.num_row_groups)), first
        first += rows
    return [], first


def _with_bytes(batch: Any, column: str) -> Any:
    """Turn a text column into bytes, so that wrong bytes are found where they are and not by pyarrow."""
    import pyarrow as pa

    index = batch.schema.get_field_index(column)
    kind = batch.schema.field(index).type
    if pa.types.is_string(kind):
        return batch.set_column(index, column, batch.column(index).cast(pa.binary()))
    if pa.types.is_large_string(kind):
        return batch.set_column(index, column, batch.column(index).cast(pa.large_binary()))
    return batch
