"""AdamW parameter groups and the learning rate, as plain functions.

Notable: the learning rate is a function of the optimiser step and the options, so nothing of it needs to be restored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

Decay = Literal["all", "matrices"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Optimization:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        betas: AdamW moments.
        eps: AdamW epsilon.
        weight_decay: decoupled weight decay.
        decay: parameters it applies to, ``all`` or ``matrices``.
        schedule: ``cosine``, ``linear`` or ``constant`` after linear warm-up, see `lr_at`.
        warmup_steps: optimiser steps of warm-up; the last of them has the peak.
        min_lr_ratio: learning rate of the cosine's last step as a share of the peak.

    Raises:
        ValueError: a number out of range.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Decay = "matrices"
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError(
                "lr must be above 0, weight_decay and warmup_steps at least 0, "
                f"got {self.lr}, {self.weight_decay}, {self.warmup_steps}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas) or self.eps < 0:
            raise ValueError(f"betas must be two numbers in [0, 1) and eps at least 0, got {self.betas} and {self.eps}")
        if not 0 <= self.min_lr_ratio <= 1 or (self.min_lr_ratio and self.schedule != "cosine"):
            raise ValueError(
                f"min_lr_ratio must lie in [0, 1] and needs schedule=cosine, got {self.min_lr_ratio} "
                f"with schedule={self.schedule}"
            )

    def check_length(self, max_steps: int | None) -> None:
        """Refuse a schedule without a length (a constant one needs none); warn if it never reaches its peak."""
        if max_steps is None and self.schedule != "constant":
            raise ValueError(f"schedule={self.schedule} needs max_steps, its length")
        if max_steps is not None and self.warmup_steps > max_steps:
            rank_zero_warn(f"warm-up takes {self.warmup_steps} of {max_steps} steps: the peak is never reached")

    def lr_at(self, step: int, max_steps: int | None) -> float:
        """Learning rate of optimiser step ``step`` = 1, 2, ... ``max_steps``, the last one.

        ``lr step / warmup_steps`` up to step ``warmup_steps``, and from there on, with
        ``p = (step - warmup_steps) / (max_steps - warmup_steps)`` and ``r = min_lr_ratio``:

        - cosine: ``lr (r + (1 - r) (1 + cos(pi p)) / 2)``, at the last step exactly ``lr r``;
        - linear: ``lr (1 - p)``;
        - constant: ``lr``, for which ``max_steps`` may be None.
        """
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant" or max_steps is None:
            return self.lr
        progress = (step - self.warmup_steps) / (max_steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.lr * (1 - progress)
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def linear_to_zero(lr: float, weight_decay: float, *, warmup_steps: int, max_steps: int | None) -> Optimization:
    """AdamW as in Transformers' trainer: all parameters decay; the rate falls to 0, or stays without ``max_steps``."""
    return Optimization(
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
        decay="all",
        schedule="constant" if max_steps is None else "linear",
        warmup_steps=warmup_steps,
    )


def decay_groups(model: nn.Module, weight_decay: float, decay: Decay) -> list[dict[str, Any]]:
    """Split trainable parameters in a decayed and an undecayed group.

    Args:
        model: the model; only parameters with ``requires_grad`` are taken, each once (tied heads).
        weight_decay: decoupled weight decay of the first group.
        decay: ``"all"`` decays every parameter; ``"matrices"`` spares norms and biases (fewer than two dimensions).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if decay == "all" or p.ndim >= 2]
    spared = [p for p in parameters if decay != "all" and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the parameter groups of an AdamW take from the options, besides the learning rate of each step."""
    return [{name: group[name] for name in ("betas", "eps", "weight_decay")} for group in optimizer.param_groups]


def total_grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm of all gradients together, float32 scalar on the device of the first."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm([g.float() for g in grads])
