"""Which checkpoints a folder holds, and what is in them; nothing but tensors and plain values is ever read."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from callbacks.checkpoint_folder import FSDP_META, gathered_shards, metadata_of, verify
from callbacks.zero_checkpoint import zero_state_dict

_STEP = re.compile(r"^step_(\d+)\.ckpt$")


def step_files(folder: str | Path) -> list[Path]:
    """The ``step_N.ckpt`` of a folder, the newest last."""
    found = [(step, path) for path in Path(folder).glob("step_*.ckpt") if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found)]


def checkpoint_step(path: str | Path) -> int | None:
    """The optimiser step in a checkpoint's file name, or None for files of another name."""
    match = _STEP.match(Path(path).name)
    return int(match[1]) if match else None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest ``step_N.ckpt`` of a folder, or None when there is none."""
    return next(reversed(step_files(folder)), None)


def named_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path names: a ``.ckpt`` file or folder, or a run folder, whose newest it is.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    itself = path.is_file() or (path.is_dir() and path.suffix == ".ckpt")
    found = path if itself else newest_checkpoint(path / "checkpoints")
    if found is None and (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} has no checkpoint yet: train further, or pass the path of a .ckpt file")
    if found is None:
        raise FileNotFoundError(f"{path} is no run folder and no checkpoint file")
    return found


def read_checkpoint(path: str | Path, *, weights: bool = True) -> dict[str, Any]:
    """Load a checkpoint on the CPU, its tensors mapped from the file, after comparing all its checksums.

    Args:
        path: ``step_N.ckpt``, a file or a folder of shards.
        weights: put the weights of shards together; else ``state_dict`` may be empty.

    Raises:
        ValueError: the file is damaged (nobody is to resume from another state without knowing), or is none of a
            training run.
    """
    if Path(path).is_dir():
        return _read_shards(Path(path), weights=weights)
    with Path(path).open("rb") as file:
        archive = file.read(2) == b"PK"
    if archive and not _is_whole(Path(path)):
        raise ValueError(f"checkpoint {path} is damaged: name another, or delete it to resume from the one before it")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True) if archive else None
    except (pickle.UnpicklingError, RuntimeError):
        checkpoint = None
    if not isinstance(checkpoint, dict) or not {"global_step", "state_dict", "model_config"} <= checkpoint.keys():
        raise ValueError(f"{path} is no checkpoint of a training run: pass a run folder or a .ckpt file inside one")
    return checkpoint


def _read_shards(folder: Path, *, weights: bool) -> dict[str, Any]:
    verify(folder)
    checkpoint = metadata_of(folder)
    if not weights:
        return checkpoint | {"state_dict": {}}
    if not (folder / FSDP_META).is_file():
        return checkpoint | {"state_dict": zero_state_dict(folder)}
    return checkpoint | gathered_shards(folder)


def _is_whole(path: Path) -> bool:
    """Whether every record of a checkpoint has the checksum it was written with (about a second for a gigabyte)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a broken directory leads the reader to anything
        return False
