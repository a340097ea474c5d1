"""Which of the processes of a launch this one is, and which device is its own."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from evaluation.scoring import choose_device


@dataclass(frozen=True)
class Process:
    """One of the processes that torchrun (or any launcher that sets the same variables) started; else the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Process:
        """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=True)))

    @property
    def is_first(self) -> bool:
        """Whether this one writes what there is one of."""
        return self.rank == 0

    def device(self, name: str, dtype: str) -> torch.device:
        """Return the device called ``name``; ``auto`` and ``cuda`` give every process of a machine one of its own.

        Raises:
            ValueError: as `evaluation.scoring.choose_device`.
        """
        device = choose_device(name, dtype)
        if device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())
