"""Records of a task on disk or on the hub: JSON lines, checked line by line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.model_paths import HUB


def read_records(path: str, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the records of a set.

    Args:
        path: a file of JSON lines; a folder that holds ``<name>.jsonl`` or ``<name>/validation.jsonl``; or
            ``hub:OWNER/NAME``, a data set with that file, by itself or in its ``data.zip``.
        name: the set.
        columns: what every record must hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object or lacks a column; the number of the line is told.
    """
    if path.startswith(HUB):
        place, lines = path, _hub_lines(path.removeprefix(HUB), name)
    else:
        file = Path(path) / f"{name}.jsonl" if Path(path).is_dir() else Path(path)
        if not file.is_file() and (nested := Path(path) / name / "validation.jsonl").is_file():
            file = nested
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: pass data.path=FOLDER with {name}.jsonl, or that file")
        place, lines = str(file), file.read_bytes().split(b"\n")
    records = list(parse_lines(lines, place, columns))
    if not records:
        raise ValueError(f"{place} holds no record")
    return records


def parse_lines(lines: Iterable[bytes], place: str, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Yield the objects of JSON lines; empty lines are skipped.

    Raises:
        ValueError: as `read_records`.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{place}, line {number} is no JSON ({error}): the file is damaged or cut off; fetch it again"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}, line {number} is no JSON object, got {type(record).__name__}")
        missing = [column for column in columns if column not in record]
        if missing:
            raise ValueError(
                f"{place}, line {number} lacks {', '.join(missing)}; it has {', '.join(record) or 'nothing'}"
            )
        yield record


def _hub_lines(repository: str, name: str) -> list[bytes]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(repository, f"{name}.jsonl", repo_type="dataset")).read_bytes().split(b"\n")
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            archive = hf_hub_download(repository, "data.zip", repo_type="dataset")
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"hub:{repository} gives no {name}.jsonl ({reason}): pass a local folder") from error
    with zipfile.ZipFile(archive) as files:
        member = next((entry for entry in files.namelist() if entry.rsplit("/", 1)[-1] == f"{name}.jsonl"), None)
        if member is None:
            raise FileNotFoundError(f"hub:{repository} holds no {name}.jsonl")
        return files.read(member).split(b"\n")
