"""The run folder: composed config, versions, metrics; and whether a run starts, resumes or must not.

runs/NAME/config.yaml versions.json train.jsonl metrics.json checkpoints/step_N.ckpt logs/ model/
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoint import checkpoint_step, find_checkpoint
from evaluation.results import git_commit, write_json, write_text

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
FREE_TRAINER = (
    "accelerator",
    "benchmark",
    "default_root_dir",
    "detect_anomaly",
    "devices",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "inference_mode",
    "limit_val_batches",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "max_time",
    "num_nodes",
    "num_sanity_val_steps",
    "plugins",
    "profiler",
    "strategy",
    "sync_batchnorm",
)
PACKAGES = ("torch", "triton", "lightning", "transformers", "tokenizers", "peft", "datasets", "hydra-core")


def open_run(config: dict[str, Any]) -> tuple[Path, Path | None]:
    """Decide where a run writes and what it resumes from; write nothing.

    Returns:
        The output folder and the checkpoint to resume from (None = start from the beginning).

    Raises:
        FileExistsError: the folder holds a run and ``resume=false`` asks for a new one, or later checkpoints than the
            one to resume from.
        ValueError: the folder holds a run with other options, or the newest checkpoint is damaged.
    """
    folder, resume = Path(config["output"]), config["resume"]
    # The first process decides; the others may come when it has already begun to write.
    holds_run = (folder / "config.yaml").is_file() and rank_zero_only.rank == 0
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
        _refuse_later_checkpoints(folder, Path(resume))
        return folder, Path(resume)
    return folder, find_checkpoint(folder / "checkpoints") if resume in ("auto", True) else None


def _refuse_later_checkpoints(folder: Path, chosen: Path) -> None:
    newest = find_checkpoint(folder / "checkpoints")
    step = checkpoint_step(chosen)
    if newest is not None and step is not None and (checkpoint_step(newest) or 0) > step:
        raise FileExistsError(
            f"{folder} already holds {newest.name}, later than {chosen.name}: pass another output= to branch off there"
        )


def write_start(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.yaml`` and ``versions.json`` of a run that starts or continues (rank 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_json(folder / "versions.json", versions())


def versions() -> dict[str, Any]:
    """Python, packages and git commit of this process."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {"python": platform.python_version(), **found, "git": git_commit()}


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
        kept["trainer"] = {key: value for key, value in config["trainer"].items() if key not in FREE_TRAINER}
    return kept
