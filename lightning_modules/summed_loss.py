"""Training by a loss of one's own: a sum over targets, and steps that are not finite.

Notable: the gradient of an optimiser step is that of ``sum of losses / N`` over all ranks and micro-batches, N being
the targets of the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.non_finite_steps import NonFiniteSteps

MAX_SKIPPED_STEPS = 10


class SummedLossModule(CausalLMModule):
    """A module whose `loss` gives a sum and the number of targets it runs over; arguments are those of its base."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.skipping = NonFiniteSteps(MAX_SKIPPED_STEPS)

    def splitting_problem(self) -> str | None:
        """The losses here look at whole sequences."""
        return f"the loss of {type(self).__name__} needs whole sequences"

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of losses float32, number of targets int64, and detached numbers; ``nll_sum`` where the loss is more."""
        raise AttributeError(f"{type(self).__name__} defines no loss")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return the share of the step's loss that this micro-batch is."""
        self.seed_micro_batch(batch_idx)
        loss_sum, num_targets, metrics = self.loss(batch)
        factor = self.step_factor(batch, num_targets, batch_idx)
        self.skipping.watch(loss_sum)
        self.watch_metrics(metrics, batch_idx)
        nll_sum = metrics.get("nll_sum", loss_sum.detach())
        return {"loss": loss_sum * factor, "nll_sum": nll_sum, "num_targets": num_targets}

    def watch_metrics(self, metrics: dict[str, Tensor], batch_idx: int) -> None:
        """Log the numbers of a step's last micro-batch; methods that add them up do so here."""
        if self.ends_step(batch_idx):
            for name, value in metrics.items():
                self.log(f"train/{name}", value)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how many steps were skipped so far."""
        if self.ends_step(batch_idx):
            self.log("train/skipped_steps", float(self.skipping.skipped))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, then drop the step if its loss or gradient is not finite on any rank.

        DeepSpeed holds the gradients itself: there a loss that is not finite ends the run.
        """
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.trainer.precision != "16-mixed":  # its scaler skips by itself
            can_skip = not self.trainer.strategy.handles_gradient_accumulation
            self.skipping.end_step(self.parameters(), self.grad_norm, can_skip=can_skip)
