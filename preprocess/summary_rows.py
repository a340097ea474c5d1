"""Rows of one file as dictionaries, each with its place: json lines, a json array, parquet, csv, arrow."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocess.records import JSON_SUFFIX, LINES_SUFFIXES, PARQUET_SUFFIX, _open_lines, decode, parse_line

CSV_SUFFIX, ARROW_SUFFIX = ".csv", ".arrow"
# The first kind that a folder holds is read: the others describe it.
ROW_SUFFIXES = (PARQUET_SUFFIX, ARROW_SUFFIX, *LINES_SUFFIXES, CSV_SUFFIX, JSON_SUFFIX)
BATCH_ROWS = 16

Row = tuple[str, dict[str, Any]]


def row_suffix(path: Path) -> str | None:
    """Return the known ending of a file name, None if there is none."""
    name = path.name.lower()
    return max((suffix for suffix in ROW_SUFFIXES if name.endswith(suffix)), key=len, default=None)


def read_records(path: Path) -> Iterator[Row]:
    """Yield where a row is, and the row.

    Raises:
        ValueError: an unknown kind of file, or one that is damaged or cut off; names file and place.
    """
    suffix = row_suffix(path)
    if suffix is None:
        raise ValueError(f"{path} is of no known kind: use one of {', '.join(ROW_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: nothing to read")
    readers = {PARQUET_SUFFIX: _parquet, ARROW_SUFFIX: _arrow, CSV_SUFFIX: _csv, JSON_SUFFIX: _json}
    try:
        yield from readers.get(suffix, _lines)(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _lines(path: Path) -> Iterator[Row]:
    with _open_lines(path) as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                place = f"{path} line {number}"
                yield place, parse_line(content, place, errors="strict")


def _json(path: Path) -> Iterator[Row]:
    """Read one array of objects, or json lines."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith(b"["):
        yield from _lines(path)
        return
    text = decode(path.read_bytes(), str(path), errors="strict").removeprefix("\ufeff")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole json array ({error})") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {number} holds a {type(row).__name__}: one object per row is expected")
        yield f"{path} row {number}", row


def _csv(path: Path) -> Iterator[Row]:
    text = decode(path.read_bytes(), str(path), errors="strict").removeprefix("\ufeff")
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path} names a column twice: {', '.join(header)}")
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{place} has {len(row)} fields, the header {len(header)}: the file is cut or no csv")
            yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is not csv ({error}): the file is cut or no csv") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        yield from _numbered(path, file.iter_batches(BATCH_ROWS))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]})") from error


def _arrow(path: Path) -> Iterator[Row]:
    """Read an arrow file, or the stream that ``datasets`` writes."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                opened = pa.ipc.open_file(source)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(source))
            yield from _numbered(path, batches)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{path} is not a whole arrow file ({str(error).splitlines()[0]})") from error


def _numbered(path: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            yield f"{path} row {number}", record
            number += 1
