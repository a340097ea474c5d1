"""Checkpoint files that are either whole or absent, how many of them there are, and the one to resume from."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint

_STEP = re.compile(r"^step_(\d+)\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write ``x.ckpt`` under a temporary name in its own folder, flush it to the disk, rename it.

    Lightning's own writer goes through the system's temporary folder, and a move from there to another disk is a
    copy that a kill can interrupt.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Save atomically; an interrupted save leaves at most a ``.part`` file, which nothing reads."""
        if storage_options is not None:
            raise TypeError(f"storage_options are for remote stores, got {storage_options!r} for {path}")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # a full disk, which torch may report as a RuntimeError
            partial.unlink(missing_ok=True)
            raise OSError(f"cannot write checkpoint {target} ({error}): free space and resume") from error
        os.replace(partial, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class StepCheckpoint(Checkpoint):
    """Save ``step_<n>.ckpt`` every so many optimiser steps and when training ends; keep the newest.

    Which files are surplus is read off the folder after every save, so any number of kills and resumes leaves as many
    as are asked for.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: optimiser steps between saves.
        save_top_k: files to keep, the newest; None keeps all.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, dirpath: str, *, every_n_train_steps: int, save_top_k: int | None = 2) -> None:
        if every_n_train_steps < 1 or (save_top_k is not None and save_top_k < 1):
            raise ValueError(
                f"every_n_train_steps and save_top_k must be at least 1, got {every_n_train_steps} and {save_top_k}; "
                "save_top_k=null keeps all, ~callbacks.checkpoint saves none"
            )
        self.folder, self.every_n_train_steps, self.save_top_k = Path(dirpath), every_n_train_steps, save_top_k
        self._saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that training starts from needs no file."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step that is due."""
        if trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._saved_step or trainer.fast_dev_run:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step_{self._saved_step}.ckpt")
        for path in _step_files(self.folder)[: -self.save_top_k] if self.save_top_k else []:
            trainer.strategy.remove_checkpoint(path)


def _step_files(folder: str | Path) -> list[Path]:
    """``step_N.ckpt`` files of a folder, the newest last."""
    found = [(step, path) for path in Path(folder).glob("step_*.ckpt") if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found)]


def checkpoint_step(path: str | Path) -> int | None:
    """The optimiser step in a checkpoint's file name, or None for files of another name."""
    match = _STEP.match(Path(path).name)
    return int(match[1]) if match else None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest ``step_N.ckpt`` of a folder, or None when there is none."""
    return next(reversed(_step_files(folder)), None)


def named_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path names: a ``.ckpt`` file, or a run folder, whose newest it is.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    found = path if path.is_file() else newest_checkpoint(path / "checkpoints")
    if found is None and (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} has no checkpoint yet: train further, or pass the path of a .ckpt file")
    if found is None:
        raise FileNotFoundError(f"{path} is no run folder and no checkpoint file")
    return found


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU, its tensors mapped from the file, after comparing all its checksums.

    Raises:
        ValueError: the file is damaged (nobody is to resume from another state without knowing), or is none of a
            training run.
    """
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


def _is_whole(path: Path) -> bool:
    """Whether every record of a checkpoint has the checksum it was written with (about a second for a gigabyte)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a broken directory leads the reader to anything
        return False
