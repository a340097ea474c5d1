"""A model in slices over the processes of a device mesh: FSDP2, layer by layer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Methods that run the model: the weights outside of its layers are gathered for each as a whole.
STEPS = ("on_train_start", "training_step", "validation_step")


def shard_module(module: pl.LightningModule, model: nn.Module) -> None:
    """Slice a Lightning module over the data-parallel dimension of its mesh.

    Every decoder layer is a unit that is gathered for its forward and backward pass. Everything else (embeddings,
    head, chunk memory) is one unit that is gathered for a whole step: losses that read the weight of the head find it.

    Args:
        module: its ``device_mesh`` is set.
        model: the Hugging Face model in it.

    Raises:
        ValueError: no layers are found to slice.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = module.device_mesh["data_parallel"]  # type: ignore[index]
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers that can be sharded: use trainer=ddp")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in STEPS:
        register_fsdp_forward_method(module, name)


def whole(value: Any) -> Tensor:
    """A tensor that may be spread over processes, as an ordinary one; all processes must call."""
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered
