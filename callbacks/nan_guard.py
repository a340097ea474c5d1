"""Stop on a loss that is not a number, before it reaches the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class NonFiniteLossError(ValueError):
    """Raised when the loss of an optimiser step is infinite or not a number."""


class NaNGuard(pl.Callback):
    """Check the losses of all micro-batches once per optimiser step, before the optimiser is applied.

    On a bad one the state before the step is saved as ``nan_step_<n>.ckpt`` in the run folder (a name that
    resuming does not look for; n = optimiser steps applied so far) and training stops with the step and the
    samples. The state can be loaded to run the step again.

    Args:
        output: the run folder; None is the trainer's ``default_root_dir``.
    """

    def __init__(self, *, output: str | None = None) -> None:
        self.output = output
        self._seen: list[tuple[Tensor, Tensor | None]] = []
        self._sample_index: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start an empty step."""
        self._seen = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which samples the micro-batch holds."""
        self._sample_index = batch.get("sample_index") if isinstance(batch, dict) else None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss without looking at it: the host waits once per step only."""
        self._seen.append((loss.detach(), self._sample_index))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the losses and the gradient of the step on all ranks; save and stop if one is not finite."""
        seen, self._seen = self._seen, []
        bad = ~torch.isfinite(torch.stack([loss for loss, _ in seen]))
        # A finite loss can have an infinite gradient, which clipping would spread over all weights.
        # Scaled float16 gradients overflow in ordinary steps, which the scaler skips.
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None and trainer.precision != "16-mixed"]
        norm: Any = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        broken = bad.any() | ~torch.isfinite(norm).to(bad.device)
        if float(trainer.strategy.reduce(broken.float(), reduce_op="sum")) == 0:
            return
        _rewind(trainer, len(seen) - 1)
        path = Path(self.output or trainer.default_root_dir) / f"nan_step_{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        found = [entry for entry, is_bad in zip(seen, bad.tolist(), strict=True) if is_bad]
        mine = bool(broken)
        raise NonFiniteLossError(
            f"the {'gradient' if mine and not found else 'loss'} is not finite in step {trainer.global_step + 1}"
            f"{_describe(found or (seen if mine else []))}; the state before this step "
            f"is saved in {path}; try a lower learning rate or look at these samples"
        )


def _rewind(trainer: pl.Trainer, num_batches: int) -> None:
    """Count the earlier micro-batches of this step as not taken: their gradients are not part of the saved state."""
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    current.completed -= num_batches
    current.ready = current.started = current.processed = current.completed


def _describe(found: list[tuple[Tensor, Tensor | None]]) -> str:
    if not found:
        return " on another rank"
    values = ", ".join(str(float(loss)) for loss, _ in found)
    indices = [str(index) for _, samples in found if samples is not None for index in samples.tolist()]
    return f" ({values}), sample indices {', '.join(indices)}" if indices else f" ({values})"
