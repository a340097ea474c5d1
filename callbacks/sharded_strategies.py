"""Strategies that shard a model over processes; their checkpoints are folders that are whole or absent.

Notable: a checkpoint of adapters holds what is learnt alone, see `callbacks.sharded_state`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from callbacks.checkpoint_folder import (
    DEEPSPEED,
    FSDP2,
    ONE_FILE,
    flush_folder,
    metadata_of,
    refuse_other_layout,
    seal,
    sliced_shapes,
)
from callbacks.sharded_state import (
    ADAPTERS,
    fill_slices,
    learnt_state_alone,
    named_moments,
    refuse_other_shapes,
    shapes_of,
)


def remove(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def finish(partial: Path, target: Path) -> str | None:
    """Seal what all processes have written and give it its name; return what went wrong, None if nothing."""
    replaced = target.with_name(target.name + ".old")
    try:
        if partial.is_dir():
            seal(partial)
        remove(replaced)
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        flush_folder(target.parent)
    except OSError as error:
        remove(partial)
        return f"cannot write checkpoint {target} ({error}): free space and resume"
    remove(replaced)
    return None


class SealedCheckpoints:
    """Let all processes write ``x.ckpt.part/``, then seal it and give it its name.

    Attributes:
        layouts: checkpoints that the strategy reads.
    """

    layouts: tuple[str, ...]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """Save the shards of all processes, which all must call."""
        strategy: Any = self
        target = Path(strategy.broadcast(str(filepath)))
        partial = target.with_name(target.name + ".part")
        if strategy.is_global_zero:
            remove(partial)
        strategy.barrier()
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)  # type: ignore[misc]
        except (OSError, RuntimeError) as error:  # a full disk, which torch may report as a RuntimeError
            if strategy.is_global_zero:
                remove(partial)
            raise OSError(f"cannot write checkpoint {target} ({error}): free space and resume") from error
        strategy.barrier()
        problem = finish(partial, target) if strategy.is_global_zero else None
        problem = strategy.broadcast(problem)
        if problem is not None:
            raise OSError(problem)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the shards of this process; weights that a checkpoint of adapters leaves out stay as they are.

        Raises:
            ValueError: the checkpoint is not for this strategy.
        """
        strategy: Any = self
        path = Path(strategy.broadcast(str(checkpoint_path)))
        refuse_other_layout(path, self.layouts)
        stored = metadata_of(path)
        with learnt_state_alone(strategy.lightning_module) if ADAPTERS in stored else nullcontext():
            self.check_shards(path, stored)
            return self.load_shards(path, weights_only)

    def load_shards(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """Load a checkpoint of one of the readable layouts."""
        loaded: dict[str, Any] = super().load_checkpoint(path, weights_only)  # type: ignore[misc]
        return loaded

    def check_shards(self, path: Path, stored: dict[str, Any]) -> None:
        """Refuse shards that the engine could not load, before it tries."""
        raise AttributeError(f"{type(self).__name__} defines no check")

    def saved_state(self) -> AbstractContextManager[None]:
        """What of the module's state a checkpoint holds: all, or with adapters what is learnt."""
        module = self.lightning_module  # type: ignore[attr-defined]
        return learnt_state_alone(module) if getattr(module, "frozen_identity", None) else nullcontext()


class FullyShardedData(SealedCheckpoints, ModelParallelStrategy):
    """FSDP2 over all processes: every one holds a slice of weights, gradients and moments.

    Args:
        save_distributed_checkpoint: every process writes its slices into a folder; else the first one gathers all of
            it and writes one file, which needs the memory.
        process_group_backend: ``nccl``, ``gloo``; None: what goes with the device.
    """

    layouts = (FSDP2, ONE_FILE)

    def __init__(self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights in the slices of this process, or whole in the first one."""
        with self.saved_state():
            return super().lightning_module_state_dict()

    def check_shards(self, path: Path, stored: dict[str, Any]) -> None:
        """Refuse weights of other names or shapes; those of a file are looked at when it is loaded.

        Raises:
            ValueError: they are of another model.
        """
        assert self.model is not None
        if path.is_dir():
            refuse_other_shapes(shapes_of(self.model.state_dict()), sliced_shapes(path))

    def load_shards(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """Load a folder, or of one file, whoever has written it, the slices of this process."""
        if path.is_dir():
            return super().load_shards(path, weights_only)
        from torch.distributed.checkpoint import state_dict as sharded  # slow to import

        assert self.model is not None
        stored: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        options = sharded.StateDictOptions(full_state_dict=True)
        fill_slices(self.model, stored.pop("state_dict"))
        for optimizer, state in zip(self.optimizers, stored["optimizer_states"], strict=False):
            named = named_moments(self.model, optimizer, state)
            sharded.set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return stored

    def setup_environment(self) -> None:
        """All processes split the data, none the layers."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


class ShardedDeepSpeed(SealedCheckpoints, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with its options.

    Offloaded moments are updated by torch's AdamW on the host: DeepSpeed's own needs a compiler on every machine.

    Args:
        stage: of ZeRO.
        **options: of Lightning's strategy.

    Raises:
        ValueError: ``exclude_frozen_parameters``, which follows from the model.
    """

    layouts = (DEEPSPEED,)

    def __init__(self, stage: int = 2, **options: Any) -> None:
        if "exclude_frozen_parameters" in options:
            raise ValueError("exclude_frozen_parameters follows from the model: leave it out of trainer.strategy")
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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """Save the shards of all processes, without those of frozen weights if the module leaves these out."""
        self.exclude_frozen_parameters = ADAPTERS in checkpoint
        with self.saved_state():
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def check_shards(self, path: Path, stored: dict[str, Any]) -> None:
        """Refuse moments of other weights, or cut for another number of processes.

        Raises:
            ValueError: they are.
        """
        assert self.lightning_module is not None
        learnt = {name: p for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        own = {name: getattr(p, "ds_shape", p.shape) for name, p in learnt.items()}  # partitioned ones are empty
        refuse_other_shapes(own, {name: shape for group in stored["param_shapes"] for name, shape in group.items()})
        written, here = stored["dp_world_size"], self.world_size
        if written != here:
            raise ValueError(
                f"checkpoint {path} was written by {written} DeepSpeed processes and this run has {here}: resume with "
                f"{written} (sequences_per_step keeps the batch), or begin another run with its weights: "
                f"python export.py checkpoint={path}, then model.path=FOLDER"
            )
