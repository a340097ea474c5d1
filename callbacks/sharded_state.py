"""The state of a module and its optimiser, as strategies that shard them write and read it.

Notable: a checkpoint of adapters, which the Lightning module marks under `ADAPTERS`, holds what is learnt alone. The
engines ask the module for its ``state_dict`` in several places; it leaves out there what is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

ADAPTERS = "frozen_weights"
Shapes = dict[str, torch.Size]


@contextmanager
def learnt_state_alone(module: pl.LightningModule) -> Iterator[None]:
    """Leave what is frozen out of the ``state_dict`` of a module, a tied weight by each name; loading misses none."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def drop(_: Any, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    handle, strict = module.register_state_dict_post_hook(drop), module.strict_loading
    module.strict_loading = False
    try:
        yield
    finally:
        handle.remove()
        module.strict_loading = strict


def shapes_of(state: Mapping[str, torch.Tensor]) -> Shapes:
    """Names and shapes of tensors, sliced ones as wholes."""
    return {name: tensor.shape for name, tensor in state.items()}


def refuse_other_shapes(own: Shapes, stored: Shapes) -> None:
    """Raise ValueError unless a checkpoint holds the tensors of a module."""
    odd = [name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name)]
    if odd:
        raise ValueError(
            f"the checkpoint belongs to another model: {len(odd)} tensors differ, first {min(odd)}: choose the recipe "
            "it was trained with, or another output="
        )


@torch.no_grad()
def fill_slices(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy whole tensors into the state of a module, of a sliced one the slice of this process.

    Raises:
        ValueError: names or shapes differ.
    """
    own = module.state_dict()
    refuse_other_shapes(shapes_of(own), shapes_of(state))
    for name, tensor in own.items():
        value = state[name].to(tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


def named_moments(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser by the names of its parameters.

    The numbers in its place differ with who has written them; the order of the parameters in their groups does not.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, own, strict=True))
    groups = [group | {"params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {name_of[number]: moments for number, moments in state["state"].items()}, "param_groups": groups}
