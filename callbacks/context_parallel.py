"""Context parallelism: neighbouring processes share every sequence, groups of them share the samples."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from kernels.context_parallel import SequenceGroup


class ContextParallel(DDPStrategy):
    """DDP over all processes, of which ``context_parallel_size`` neighbours compute one sequence together.

    Every process holds the whole model. Those of a group read the same batches and compute their own part of the
    tokens; gradients are added up over all processes, as DDP does.

    Args:
        context_parallel_size: processes of a group; ``auto``: all.
        process_group_backend: ``nccl``, ``gloo``; None: what goes with the device.

    Attributes:
        sequence_group: the group of this process, once processes are connected; None: it has each sequence to itself.

    Raises:
        ValueError: groups of this size do not divide the processes.
    """

    def __init__(
        self, context_parallel_size: int | Literal["auto"] = "auto", process_group_backend: str | None = None
    ) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self.context_parallel_size = context_parallel_size
        self.sequence_group: SequenceGroup | None = None

    @property
    def group_size(self) -> int:
        """Processes that share a sequence."""
        processes = self.num_nodes * self.num_processes
        return processes if self.context_parallel_size == "auto" else self.context_parallel_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Whose samples this process reads: those of its group."""
        processes = self.num_nodes * self.num_processes
        return {"num_replicas": processes // self.group_size, "rank": self.global_rank // self.group_size}

    def setup_distributed(self) -> None:
        """Connect all processes, then those of every group; once, though every loop of the trainer asks for it."""
        processes = self.num_nodes * self.num_processes
        if self.group_size < 1 or processes % self.group_size:
            raise ValueError(
                f"context_parallel_size must divide the number of processes, got {self.group_size} and {processes}"
            )
        super().setup_distributed()
        if self.group_size == 1 or self.sequence_group is not None:
            return
        for first in range(0, processes, self.group_size):
            ranks = list(range(first, first + self.group_size))
            connection = dist.new_group(ranks)  # which every process has to call for every group
            if self.global_rank in ranks:
                assert isinstance(connection, dist.ProcessGroup)
                self.sequence_group = SequenceGroup(ranks, ranks.index(self.global_rank), connection)
