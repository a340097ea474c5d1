"""AdamW parameter groups and learning-rate schedules, as plain functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
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
        schedule: ``cosine``, ``linear`` or ``constant`` after linear warm-up.
        warmup_steps: optimiser steps of warm-up.
        min_lr_ratio: final learning rate of the cosine as a share of the peak.

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
        if not 0 <= self.min_lr_ratio <= 1 or (self.min_lr_ratio and self.schedule != "cosine"):
            raise ValueError(
                f"min_lr_ratio must lie in [0, 1] and needs schedule=cosine, got {self.min_lr_ratio} "
                f"with schedule={self.schedule}"
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


def lr_schedule(
    optimizer: torch.optim.Optimizer, name: Schedule, *, warmup_steps: int, max_steps: int, min_lr_ratio: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then ``cosine`` or ``linear`` decay to ``min_lr_ratio`` times the peak, or ``constant``.

    The cosine is lr(t) = peak (r + (1 - r) (1 + cos(pi t')) / 2) with t' the share of the steps after warm-up.
    """
    names = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup", "linear": "linear"}
    from transformers.optimization import get_scheduler  # imports peft: a second that other uses need not pay

    options = {"min_lr_rate": min_lr_ratio} if name == "cosine" else None
    return get_scheduler(
        names[name],
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_steps,
        scheduler_specific_kwargs=options,
    )


def total_grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm of all gradients together, float32 scalar on the device of the first."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm([g.float() for g in grads])
