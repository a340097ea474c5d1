"""Checkpoints of a model with adapters: what training changes, and which frozen weights it stands on.

Notable: frozen weights come from where the run has them (a folder, the hub, a seed), so a checkpoint holds none of
them. It names them by sums over their bits, exact on every device, and is refused on top of other ones. Under `BASE` it
says that it does, which is also what strategies that write and read shards themselves go by.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

BASE = "frozen_weights"
# Sums are taken over blocks that a cache holds: a second for a gigabyte, where torch's own take eight.
_COLUMNS, _ROWS = 1 << 14, 64


def frozen_names(module: nn.Module) -> set[str]:
    """Names in the state dict that training does not change, a tied parameter under each of its names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def frozen_identity(module: nn.Module) -> str:
    """Return a digest of names, shapes and contents of the frozen parameters."""
    hasher = hashlib.sha256()
    state, frozen = module.state_dict(), frozen_names(module)
    for name in sorted(frozen & state.keys()):
        tensor = state[name]
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_bit_sum(tensor)}\n".encode())
    return "sha256:" + hasher.hexdigest()


def leave_frozen_out(module: nn.Module, checkpoint: dict[str, Any], identity: str) -> None:
    """Take the frozen parameters out of a checkpoint and note which they are."""
    frozen = frozen_names(module)
    if "state_dict" in checkpoint:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name not in frozen}
    checkpoint[BASE] = identity


def put_frozen_back(module: nn.Module, checkpoint: dict[str, Any], identity: str | None) -> None:
    """Complete a checkpoint that `leave_frozen_out` made with the frozen parameters of this module.

    Of shards, which their strategy has loaded by itself, nothing is left to complete.

    Args:
        module: the module that loads it.
        checkpoint: changed in place.
        identity: that of the module's frozen parameters; None without adapters.

    Raises:
        ValueError: the checkpoint was trained on top of others.
    """
    if BASE not in checkpoint:
        return
    if checkpoint[BASE] != identity:
        raise ValueError(
            "the checkpoint holds adapters of a model with other frozen weights: load the model that they were trained "
            "on (model.path, or the seed it was drawn with), or choose another output="
        )
    if checkpoint.get("state_dict"):
        own = module.state_dict()
        checkpoint["state_dict"] |= {name: own[name] for name in frozen_names(module) & own.keys()}


def _bit_sum(tensor: Tensor) -> int:
    """Sum the bits of a tensor as integers; no rounding, so neither order nor device matter."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(kinds[tensor.element_size()]).flatten()
    rows = bits[: len(bits) // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    sums = torch.zeros(_COLUMNS, dtype=torch.int64, device=bits.device)
    for block in rows.split(_ROWS):
        sums += block.to(torch.int64).sum(0)
    rest = bits[rows.numel() :].to(torch.int64)
    # Every other entry counts more, so that an exchange of neighbours is seen.
    return 3 * int(sums.sum() + rest.sum()) + int(sums[::2].sum() + rest[::2].sum())
