"""Checkpoint files that are either whole or absent, and the one to resume from."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

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


def find_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole ``step_N.ckpt`` of a folder, or None when there is none.

    Raises:
        ValueError: the newest file is damaged (a copy that broke off, say), so that nobody resumes from an older
            state without knowing.
    """
    found = [(int(match[1]), path) for path in Path(folder).glob("step_*.ckpt") if (match := _STEP.match(path.name))]
    if not found:
        return None
    newest = max(found)[1]
    if not zipfile.is_zipfile(newest):
        raise ValueError(f"checkpoint {newest} is damaged: delete it to resume from the one before it")
    return newest


def checkpoint_step(path: str | Path) -> int | None:
    """The optimiser step in a checkpoint's file name, or None for files of another name."""
    match = _STEP.match(Path(path).name)
    return int(match[1]) if match else None
