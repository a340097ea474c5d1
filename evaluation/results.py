"""Result files that are whole or absent, identities of what was measured, and tables."""

import csv
import hashlib
import io
import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READ_BLOCK = 1 << 20
NOT_FINITE = "not_finite"


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON (see `json_text`) atomically."""
    write_text(path, json_text(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote, numbers that are not finite included.

    Raises:
        ValueError: the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (a {type(value).__name__} instead of an object): remove it")
    for entry in value.pop(NOT_FINITE, []):
        node: Any = value
        *parents, last = entry["place"]
        for key in parents:
            node = node[key]
        node[last] = float(entry["value"])
    return value


def json_text(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return strict JSON, which has no NaN and no infinity.

    Such numbers become null, and ``not_finite`` lists them as ``{"place": [key, index, ...], "value": "nan"}``.
    """
    lost: list[dict[str, Any]] = []
    plain = _strict(value, [], lost)
    return json.dumps(plain | {NOT_FINITE: lost} if lost else plain, indent=indent, allow_nan=False)


def _strict(value: Any, place: list[str | int], lost: list[dict[str, Any]]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item, [*place, str(key)], lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, [*place, index], lost) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append({"place": place, "value": str(value)})
        return None
    return value


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def model_identity(folder: Path) -> str:
    """Return ``sha256:`` over names and contents of a model folder's configuration and weight files."""
    hasher = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "config.json" and path.suffix not in (".safetensors", ".bin"):
            continue
        hasher.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(READ_BLOCK):
                hasher.update(block)
    return "sha256:" + hasher.hexdigest()


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as aligned text, four decimals; columns without any text in them stand to the right."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    numeric = [all(not isinstance(row.get(column), str) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(_line(line, widths, numeric) for line in lines)


def _line(texts: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    fields = zip(texts, widths, numeric, strict=True)
    return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in fields).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def git_commit() -> str | None:
    """Commit of the source tree, with ``+changes`` when it has uncommitted ones; None outside a git clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        command = [*git, "status", "--porcelain", "--untracked-files=no"]
        status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if status else "")
