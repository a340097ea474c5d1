"""The run folder: composed config, versions, metrics; and whether a run starts, resumes or must not.

runs/NAME/config.yaml versions.json train.jsonl metrics.json checkpoints/step_N.ckpt logs/ model/
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from callbacks.checkpoint import find_checkpoint

# What may change between the parts of one run without changing what it learns.
FREE = (
    "resume",
    "output",
    "dry_run",
    "callbacks",
    "logger",
    "prepare",
    "export_model",
    "eval_every_n_steps",
    "data.num_workers",
    "data.pin_memory",
    "data.eval_lengths",
    "data.eval_batch_tokens",
    "data.max_eval_tokens",
    "data.max_steps",
    "module.max_steps",
    "module.compile",
    "trainer",
)
BOUND_TRAINER = ("accumulate_grad_batches", "precision", "gradient_clip_val")
PACKAGES = ("torch", "triton", "lightning", "transformers", "tokenizers", "peft", "datasets", "hydra-core")


def open_run(config: dict[str, Any]) -> tuple[Path, Path | None]:
    """Decide where a run writes and what it resumes from; write nothing.

    Returns:
        The output folder and the checkpoint to resume from (None = start from the beginning).

    Raises:
        FileExistsError: the folder holds a run and ``resume=false`` asks for a new one.
        ValueError: the folder holds a run with other options, or the newest checkpoint is damaged.
    """
    folder, resume = Path(config["output"]), config["resume"]
    holds_run = (folder / "config.yaml").is_file()
    if resume is False and holds_run:
        raise FileExistsError(f"{folder} already holds a run: pass another output=, or resume=auto to continue it")
    if holds_run:
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        changed = differences(_bound(before), _bound(config))
        if changed:
            raise ValueError(
                f"{folder} holds a run with other options ({'; '.join(changed)}): "
                "pass another output=, or the options it was started with"
            )
    if isinstance(resume, str) and resume != "auto":
        return folder, Path(resume)
    return folder, find_checkpoint(folder / "checkpoints") if resume in ("auto", True) else None


def write_start(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.yaml`` and ``versions.json`` of a run that starts or continues (rank 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_json(folder / "versions.json", versions())


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, Any]:
    """Python, packages and git commit of this process."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {"python": platform.python_version(), **found, "git": git_commit()}


def git_commit() -> str | None:
    """Commit of the source tree, with ``+changes`` when it has uncommitted ones; None outside a git clone."""
    here = Path(__file__).resolve().parent.parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if status else "")


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Keys in which two configurations differ, as ``key: old -> new``."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if before == now else [f"{path}: {before} -> {now}"]


def _bound(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a configuration that one run may not change."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        path = prefix + key
        if path in FREE:
            continue
        kept[key] = _bound(value, path + ".") if isinstance(value, dict) else value
    if not prefix:
        kept["trainer"] = {key: config["trainer"].get(key) for key in BOUND_TRAINER}
    return kept
