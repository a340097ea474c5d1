"""SIGTERM, taken as a request to save and leave: all processes agree on the step at which they do.

Notable: Lightning's own handler talks to the other processes from inside the signal, in the middle of whatever they
exchange. Here a handler only notes the request, and the processes compare notes between steps.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning.pytorch as pl
import torch


class Termination:
    """Whether some process of a run was asked to end."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def watch(self) -> None:
        """Take SIGTERM over, in the main thread (elsewhere it is not ours to take)."""
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def leave(self) -> None:
        """Give SIGTERM back to whom it belonged."""
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    def agreed(self, trainer: pl.Trainer) -> bool:
        """Whether any process was asked; all must call it at the same place."""
        if trainer.world_size == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(asked, reduce_op="sum") > 0)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
