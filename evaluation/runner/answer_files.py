"""The files of one task's answers: settings, a journal for each process, what is published once all are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evaluation.cell_journal import CellJournal
from evaluation.results import digest, json_text, read_json, write_text


def claim_folder(folder: Path, protocol: dict[str, Any], rank: int) -> None:
    """Write what the folder belongs to, or compare it.

    Raises:
        ValueError: it belongs to other settings.
    """
    file = folder / "settings.json"
    settings = protocol | {"request": digest(protocol)}
    # Looked for before the settings, which every process writes before its predictions.
    predictions = list(folder.glob("predictions.*"))
    if file.is_file():
        found = read_json(file)
        if found.get("request") != settings["request"]:
            changed = [key for key in found | settings if key != "request" and found.get(key) != settings.get(key)]
            raise ValueError(f"{folder} belongs to other settings ({', '.join(changed)}): pass another output folder")
    elif predictions:
        raise ValueError(f"{folder} holds predictions without settings.json: pass another output folder")
    else:
        _replace(file, json_text(settings, indent=1) + "\n", rank)


def _replace(path: Path, text: str, rank: int) -> None:
    """Write a file that several processes may write at once, the same text."""
    own = path.with_name(f"{path.name}.rank{rank}.tmp")
    write_text(own, text)
    os.replace(own, path)


def answers_done(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the answers of all processes by the index of their example."""
    lines = (line for file in sorted(folder.glob("predictions.rank*.jsonl")) for line in CellJournal(file).lines())
    return {line["index"]: line for line in lines}


def publish(folder: Path, num_examples: int, protocol: dict[str, Any], rank: int) -> dict[str, Any] | None:
    """Write predictions and metrics if every example has its answer; return the metrics, or None."""
    done = answers_done(folder)
    if len(done) < num_examples:
        return None
    rows = [done[index] for index in range(num_examples)]
    names = list(rows[0]["scores"])
    scores = {name: sum(row["scores"][name] for row in rows) / len(rows) for name in names}
    prefill = [row["prefill_seconds"] for row in rows if row["prefill_seconds"] is not None]
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    metrics = {
        "task": protocol["task"],
        "num_examples": len(rows),
        "score": scores["score"],
        "scores": scores,
        "seconds": sum(row["seconds"] for row in rows),
        "prefill_seconds": sum(prefill) if len(prefill) == len(rows) else None,
        "peak_bytes": max(peaks, default=None),
        "protocol": protocol,
    }
    shown = [{key: row[key] for key in row if key != "index"} for row in rows]
    _replace(folder / "predictions.jsonl", "".join(json_text(row) + "\n" for row in shown), rank)
    _replace(folder / "metrics.json", json_text(metrics, indent=1) + "\n", rank)
    return metrics
