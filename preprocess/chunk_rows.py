"""Rows of token ids in files of json lines (plain, gzip, zstd) and parquet, streamed."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocess.records import JSON_SUFFIX, LINES_SUFFIXES, PARQUET_SUFFIX, _open_lines, parse_line, suffix_of

TOKENS_COLUMN, ID_COLUMN = "tokens", "id"
BATCH_ROWS = 16


def has_tokens(path: Path) -> bool:
    """Say whether a file has rows of token ids; a file of json lines is judged by its first row."""
    if not path.is_file():
        return False
    if suffix_of(path) == PARQUET_SUFFIX:
        return TOKENS_COLUMN in _open_parquet(path).schema_arrow.names
    if suffix_of(path) in (*LINES_SUFFIXES, JSON_SUFFIX):
        return any(TOKENS_COLUMN in record for _, record in _first(_lines(path)))
    return False


def read_token_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where a row is, with its ``id`` if it has one, and its ids.

    Raises:
        ValueError: a row without ids, or a damaged file.
    """
    rows = _parquet_rows(path) if suffix_of(path) == PARQUET_SUFFIX else _lines(path)
    for place, record in rows:
        if ID_COLUMN in record:
            place = f"{place} (id {record[ID_COLUMN]})"
        if record.get(TOKENS_COLUMN) is None:
            raise ValueError(f"{place} has no {TOKENS_COLUMN}, which other rows of the file have")
        yield place, record[TOKENS_COLUMN]


def _first(rows: Iterator[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    row = next(rows, None)
    return [] if row is None else [row]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with _open_lines(path) as file:
            for number, line in enumerate(file):
                content = line if number else line.removeprefix(codecs.BOM_UTF8)
                if content.strip():
                    place = f"{path} line {number + 1}"
                    yield place, parse_line(content, place, errors="strict")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa

    file = _open_parquet(path)
    columns = [name for name in (ID_COLUMN, TOKENS_COLUMN) if name in file.schema_arrow.names]
    number = 0
    try:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for row in range(batch.num_rows):
                yield f"{path} row {number}", {name: _plain(batch.column(name)[row]) for name in columns}
                number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]})") from error


def _plain(value: Any) -> Any:
    """Return a cell; a list as an array, which is much faster than a list of numbers."""
    items = getattr(value, "values", None)
    return value.as_py() if items is None else items.to_numpy(zero_copy_only=False)


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]})") from error
