"""Strategies that shard a model over processes; their checkpoints are folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from callbacks.checkpoint_folder import flush_folder, seal


class SealedCheckpoints:
    """Let all processes write ``x.ckpt.part/``, then seal it and give it its name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """Save the shards of all processes, which all must call."""
        strategy: Any = self
        target = Path(strategy.broadcast(str(filepath)))
        partial = target.with_name(target.name + ".part")
        if strategy.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        strategy.barrier()
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)  # type: ignore[misc]
        except (OSError, RuntimeError) as error:  # a full disk, which torch may report as a RuntimeError
            raise OSError(f"cannot write checkpoint {target} ({error}): free space and resume") from error
        strategy.barrier()
        if strategy.is_global_zero and partial.is_dir():
            seal(partial)
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
            flush_folder(target.parent)
        elif strategy.is_global_zero:
            os.replace(partial, target)
        strategy.barrier()


class FullyShardedData(SealedCheckpoints, ModelParallelStrategy):
    """FSDP2 over all processes: every one holds a slice of weights, gradients and moments.

    Args:
        save_distributed_checkpoint: every process writes its slices into a folder; else the first one gathers all of
            it and writes one file, which needs the memory.
        process_group_backend: ``nccl``, ``gloo``; None: what goes with the device.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """All processes split the data, none the layers."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


class ShardedDeepSpeed(SealedCheckpoints, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with its options.

    Offloaded moments are updated by torch's AdamW on the host: DeepSpeed's own needs a compiler on every machine.
    """

    def __init__(self, stage: int = 2, **options: Any) -> None:
        # Lightning would look for the batch size in a batch sampler, which loaders of whole batches have none of.
        super().__init__(stage=stage, **{"logging_batch_size_per_gpu": 1} | options)
        assert isinstance(self.config, dict)
        if options.get("offload_optimizer"):
            self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let every process build the whole model in host memory; the engine then splits it.

        Split from the first layer on, as Lightning would have it, neither the weights that a Hugging Face model draws
        nor those that it loads find their place.
        """
        self._init_config_if_needed()
        yield
