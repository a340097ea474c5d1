"""The float32 weights in a checkpoint of DeepSpeed ZeRO, put together without DeepSpeed and without a GPU.

Notable: stages 1 and 2 cut the concatenation of all parameters of a group into one piece for each of W processes.
Stage 3 cuts every parameter of n elements by itself into W pieces of ceil(n / W), and a process holds its pieces of all
parameters one after the other. The pieces are the master weights of the optimiser; frozen parameters lie elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

# The folder of its files that Lightning has the engine write.
TAG = "checkpoint"
# Settings of the engine, of which nothing is needed here: read as objects without content.
_SETTINGS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Setting:
    """What stands for an object of the engine."""

    def __new__(cls, *arguments: Any) -> _Setting:
        """Take any arguments."""
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Take no content."""


def model_states(folder: Path) -> list[dict[str, Any]]:
    """What each process, or the first one (stages 1 and 2), wrote about the model and the run."""
    return [_load(path) for path in _by_rank(folder, "*_model_states.pt")]


def zero_state_dict(folder: Path) -> dict[str, Tensor]:
    """Weights in a ZeRO checkpoint by their names in the Lightning module, trained ones float32, and its buffers.

    Args:
        folder: ``step_N.ckpt`` as the engine wrote it.

    Raises:
        ValueError: pieces are missing.
    """
    models = model_states(folder)
    optimizers = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
    expected = optimizers[0]["partition_count"]
    if len(optimizers) != (max(expected) if isinstance(expected, list) else expected):
        raise ValueError(f"{folder} holds the moments of {len(optimizers)} of {expected} processes")
    first = models[0]
    state = {name: first["module"][name] for name in first["buffer_names"]}
    if "fp32_flat_groups" in optimizers[0]:
        pieces = [torch.cat(optimizer["fp32_flat_groups"]) for optimizer in optimizers]
        state |= dict(_stage_3(first["param_shapes"], pieces))
        state |= dict(_frozen(first, [model["frozen_param_fragments"] or {} for model in models]))
    else:
        groups = zip(*(optimizer["single_partition_of_fp32_groups"] for optimizer in optimizers), strict=True)
        paddings = optimizers[0].get("param_alignment_paddings") or [None] * len(first["param_shapes"])
        for shapes, parts, padding in zip(first["param_shapes"], groups, paddings, strict=True):
            state |= dict(_stage_2(shapes, torch.cat(parts), padding))
        state |= dict(first["frozen_param_fragments"] or {})
    # Of a checkpoint of adapters, frozen ones are absent by each of their names.
    return state | {alias: state[name] for alias, name in first["shared_params"].items() if name in state}


def _stage_2(shapes: dict[str, torch.Size], flat: Tensor, padding: list[int] | None) -> Iterator[tuple[str, Tensor]]:
    """Cut the parameters of a group out of their concatenation."""
    offset = 0
    for number, (name, shape) in enumerate(shapes.items()):
        yield name, flat[offset : offset + shape.numel()].view(shape)
        offset += shape.numel() + (padding[number] if padding else 0)


def _stage_3(groups: list[dict[str, torch.Size]], pieces: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Join the pieces of every parameter; the last ones may be filled up."""
    offset = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        size = -(-shape.numel() // len(pieces))
        joined = torch.cat([piece[offset : offset + size] for piece in pieces])
        yield name, joined[: shape.numel()].view(shape)
        offset += size


def _frozen(first: dict[str, Any], fragments: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        joined = torch.cat([piece[name].flatten() for piece in fragments])
        yield name, joined[: shape.numel()].view(shape)


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files of all processes, in the order of their numbers."""
    found = sorted((folder / TAG).glob(pattern), key=lambda path: _numbers(path.name))
    if not found:
        raise ValueError(f"{folder} holds no {pattern}: it is no checkpoint of DeepSpeed")
    return found


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _load(path: Path) -> dict[str, Any]:
    with safe_globals([(_Setting, name) for name in _SETTINGS]):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
