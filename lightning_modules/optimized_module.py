"""A Lightning module whose ``model`` is trained by AdamW under a schedule; the rate follows from the step alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from transformers import PreTrainedModel

from lightning_modules.optimization import Optimization, decay_groups, group_options, total_grad_norm
from lightning_modules.sharding import whole


class OptimizedModule(pl.LightningModule):
    """Optimiser, learning rate and clipping of ``self.model``.

    Args:
        optimization: optimiser and schedule.
        max_steps: optimiser steps of the whole run, the schedule's length; a constant one needs none.

    Attributes:
        grad_norm: norm of the step's gradients before clipping, float32 scalar; None before the first step.

    Raises:
        ValueError: a schedule that ends, without ``max_steps``.
    """

    model: PreTrainedModel

    def __init__(self, optimization: Optimization, max_steps: int | None):
        super().__init__()
        optimization.check_length(max_steps)
        self.optimization, self.max_steps = optimization, max_steps
        self.grad_norm: torch.Tensor | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW (fused) with decay groups; `on_train_batch_start` sets its learning rate."""
        o = self.optimization
        groups = decay_groups(self.model, o.weight_decay, o.decay)
        # Lightning refuses to clip the gradients of a fused optimiser under autocast.
        fused = self._trainer is None or not str(self._trainer.precision).endswith("mixed")
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=fused)
        self.group_options = group_options(optimizer)
        return optimizer

    def on_train_start(self) -> None:
        """Put this run's options in force: a checkpoint brings those that it was saved under."""
        for group, options in zip(self.trainer.optimizers[0].param_groups, self.group_options, strict=True):
            group.update(options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the coming step, also where a prolonged run follows a longer schedule."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.optimization.lr_at(self.global_step + 1, self.max_steps)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient norm (before clipping), then clip as the trainer is told.

        DeepSpeed holds the gradients itself, and clips them; it tells their norm after the step.
        """
        self.grad_norm = whole(total_grad_norm(self.model.parameters()))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
