"""The run folder: composed config, versions, metrics; and whether a run starts, resumes or must not.

runs/NAME/config.yaml versions.json train.jsonl metrics.json checkpoints/step_N.ckpt logs/ model/
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from callbacks.checkpoint import checkpoint_step, named_checkpoint, newest_checkpoint, read_checkpoint
from configuration.compose import at_source
from configuration.step_size import settle_step_size
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
    # Their product with the processes, sequences_per_step, is what a run keeps.
    "data.accumulate_grad_batches",
    "data.batch_size",
    "data.num_workers",
    "data.pin_memory",
    "data.eval_lengths",
    "data.eval_batch_tokens",
    "data.max_eval_pairs",
    "data.max_eval_tokens",
    "data.max_steps",
    "module.max_steps",
    "module.compile",
    "trainer",
)
FREE_TRAINER = (
    "accelerator",
    "accumulate_grad_batches",
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
# What else tells what a folder holds.
_MARKS = {
    "checkpoints": "checkpoints of train.py",
    "config.json": "a model",
    "meta.json": "a corpus",
    "train/meta.json": "a corpus",
}


def other_owner(folder: Path, command: str) -> str | None:
    """What a folder holds that is not the work of this command; None where it may write."""
    if (folder / "config.yaml").is_file():
        owner = read_config(folder).get("command", "train")
        return None if owner == command else f"the results of {owner}.py"
    marks = {mark: what for mark, what in _MARKS.items() if (mark, command) != ("checkpoints", "train")}
    return next((what for mark, what in marks.items() if (folder / mark).exists()), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The composed recipe in a folder.

    Raises:
        ValueError: its ``config.yaml`` is something else.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict) or "recipe" not in config:
        raise ValueError(f"{folder / 'config.yaml'} is no recipe of this suite: pass another folder")
    return config


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint file lies in: in ``checkpoints/``, or beside it if `NaNGuard` wrote it."""
    places = (checkpoint.parent.parent, checkpoint.parent)
    return next((folder for folder in places if (folder / "config.yaml").is_file()), None)


def open_run(config: dict[str, Any]) -> tuple[Path, Path | None]:
    """Decide where a run writes and what it resumes from; write nothing.

    The first process decides; the others may come when it has already begun to write.

    Returns:
        The output folder and the checkpoint to resume from (None = start from the beginning).

    Raises:
        FileExistsError: the folder holds a run and ``resume=false`` asks for a new one, or later checkpoints than the
            one to resume from.
        FileNotFoundError: ``resume=PATH`` is no checkpoint and no run folder with one.
        ValueError: the folder holds a run with other options, or the checkpoint is damaged, foreign or beyond
            ``trainer.max_steps``.
    """
    folder, resume = Path(config["output"]), config["resume"]
    first = rank_zero_only.rank == 0
    if first and _has_begun(folder):
        _refuse_another_run(folder, config)
    named = isinstance(resume, str) and resume != "auto"
    checkpoint = named_checkpoint(resume) if named else newest_checkpoint(folder / "checkpoints") if resume else None
    if first and checkpoint is not None:
        _refuse_useless(checkpoint, folder, config)
    if first and named and checkpoint is not None:
        _warn_of_other_options(checkpoint, config)
    return folder, checkpoint


def _has_begun(folder: Path) -> bool:
    """Whether a run in this folder took a step; one that failed before that binds nobody to its options."""
    return (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("train.jsonl", "checkpoints")
    )


def _refuse_another_run(folder: Path, config: dict[str, Any]) -> None:
    if config["resume"] is False:
        raise FileExistsError(f"{folder} already holds a run: pass another output=, or resume=auto to continue it")
    changed = _changed(folder, config)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other options ({'; '.join(changed)}): "
            "pass another output=, or the options it was started with"
        )


def _refuse_useless(checkpoint: Path, folder: Path, config: dict[str, Any]) -> None:
    step, max_steps = int(read_checkpoint(checkpoint, weights=False)["global_step"]), config["trainer"]["max_steps"]
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is not None and (checkpoint_step(newest) or 0) > step:
        raise FileExistsError(
            f"{folder} already holds {newest.name}, later than {checkpoint.name}: "
            "pass another output= to branch off there"
        )
    if step > max_steps:
        raise ValueError(f"{checkpoint} is of step {step}: pass trainer.max_steps={step} or more, got {max_steps}")


def _warn_of_other_options(checkpoint: Path, config: dict[str, Any]) -> None:
    origin = run_of(checkpoint)
    changed = _changed(origin, config) if origin else []
    if changed:
        rank_zero_warn(f"{checkpoint} was trained with other options; now in force: {'; '.join(changed)}")


def _changed(folder: Path, config: dict[str, Any]) -> list[str]:
    """Options that bind a run and differ from those of the run in a folder."""
    before = read_config(folder)
    for recipe in (before, config):  # runs of older versions did not note it
        settle_step_size(recipe)
    return at_source(differences(_bound(before), _bound(config)), config)


def write_start(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.yaml`` and ``versions.json`` of work that starts or continues (rank 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
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
