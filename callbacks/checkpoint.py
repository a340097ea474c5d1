"""Checkpoints that are either whole or absent, how many of them there are, and the one to resume from.

Notable: a checkpoint is one file, or a folder of shards where the strategy splits the model
(`callbacks.checkpoint_folder`). Both are read by `callbacks.checkpoint_reading`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoint_folder import ONE_FILE, flush_folder, refuse_other_layout
from callbacks.checkpoint_reading import (
    checkpoint_step,
    named_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    step_files,
)
from callbacks.termination import Termination
from evaluation.results import write_text

__all__ = [
    "AtomicCheckpointIO",
    "StepCheckpoint",
    "checkpoint_step",
    "named_checkpoint",
    "newest_checkpoint",
    "read_checkpoint",
]

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
        for path in step_files(self.folder)[: -self.keep_last] if self.keep_last else []:
            if checkpoint_step(path) not in best:
                trainer.strategy.remove_checkpoint(path)

    def _scores(self) -> dict[int, float]:
        """The best steps so far and their values; beside the checkpoints, so that a kill loses none."""
        try:
            found = json.loads((self.folder / _SCORES).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return {int(step): float(score) for step, score in found.items()}
