"""Checkpoints that are either whole or absent, how many of them there are, and the one to resume from.

Notable: a checkpoint is one file, or a folder of shards where the strategy splits the model
(`callbacks.checkpoint_folder`). Nothing but tensors and plain values is ever read from either.
"""

from __future__ import annotations

import json
import math
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
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoint_folder import (
    FSDP_META,
    ONE_FILE,
    flush_folder,
    gathered_shards,
    metadata_of,
    refuse_other_layout,
    verify,
)
from callbacks.termination import Termination
from callbacks.zero_checkpoint import zero_state_dict
from evaluation.results import write_text

_STEP = re.compile(r"^step_(\d+)\.ckpt$")
_SCORES = "best.json"


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
        flush_folder(target.parent)

    def load_checkpoint(self, path: _PATH, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a file.

        Raises:
            ValueError: the checkpoint is a folder, which sharded strategies read.
        """
        refuse_other_layout(Path(path), (ONE_FILE,))
        loaded: dict[str, Any] = super().load_checkpoint(path, *arguments, **options)
        return loaded


class StepCheckpoint(Checkpoint):
    """Save ``step_<n>.ckpt`` every so many optimiser steps and when training ends, by SIGTERM or by itself.

    The newest and the best are kept.

    Which of them are surplus is read off the folder after every save, so any number of kills and resumes leaves as many
    as are asked for.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: optimiser steps between saves.
        keep_last: checkpoints to keep, the newest; None keeps all.
        keep_best: keep besides those with the lowest value at a validation, saved right after it.
        monitor: the value, a name that is logged.

    Raises:
        ValueError: a number below 1, or ``keep_best`` below 0.
    """

    def __init__(
        self,
        dirpath: str,
        *,
        every_n_train_steps: int,
        keep_last: int | None = 2,
        keep_best: int = 0,
        monitor: str = "val/loss",
    ) -> None:
        if every_n_train_steps < 1 or (keep_last is not None and keep_last < 1) or keep_best < 0:
            raise ValueError(
                "every_n_train_steps and keep_last must be at least 1 and keep_best at least 0, got "
                f"{every_n_train_steps}, {keep_last} and {keep_best}; "
                "keep_last=null keeps all, ~callbacks.checkpoint saves none"
            )
        self.folder, self.every_n_train_steps = Path(dirpath), every_n_train_steps
        self.keep_last, self.keep_best, self.monitor = keep_last, keep_best, monitor
        self._saved_step = 0
        self.termination = Termination()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that training starts from needs no file."""
        self._saved_step = trainer.global_step
        self.termination.watch()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step that is due, and the one at which SIGTERM ends the run."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        ending = self.termination.agreed(trainer)
        if ending or trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)
        if ending and trainer.global_step < trainer.max_steps:
            raise SIGTERMException

    def on_validation_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """SIGTERM does not wait for the end of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.termination.agreed(trainer):
            self._save(trainer)
            raise SIGTERMException

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)
        self.termination.leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take no more signals."""
        self.termination.leave()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a step that is among the best."""
        if not self.keep_best or trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"keep_best looks for {self.monitor!r}, which no validation logs; there is: "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        value, step = float(trainer.callback_metrics[self.monitor]), trainer.global_step
        known = {other: score for other, score in self._scores().items() if other < step}
        if math.isfinite(value) and sum(score <= value for score in known.values()) < self.keep_best:
            # All processes have read the scores before the first one writes them.
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                best = sorted((known | {step: value}).items(), key=lambda item: item[1])[: self.keep_best]
                write_text(self.folder / _SCORES, json.dumps({str(number): score for number, score in best}) + "\n")
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.folder / f"step_{self._saved_step}.ckpt")
            self._remove_surplus(trainer)

    def _remove_surplus(self, trainer: pl.Trainer) -> None:
        best = self._scores() if self.keep_best else {}
        for path in _step_files(self.folder)[: -self.keep_last] if self.keep_last else []:
            if checkpoint_step(path) not in best:
                trainer.strategy.remove_checkpoint(path)

    def _scores(self) -> dict[int, float]:
        """The best steps so far and their values; beside the checkpoints, so that a kill loses none."""
        try:
            found = json.loads((self.folder / _SCORES).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return {int(step): float(score) for step, score in found.items()}


def _step_files(folder: str | Path) -> list[Path]:
    """The ``step_N.ckpt`` of a folder, the newest last."""
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
