"""How many targets an optimiser step has in all: what every loss of the step is divided by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class StepTargets:
    """Count the valid targets of an optimiser step over all ranks and micro-batches.

    Lightning divides a returned loss by the accumulation and averages gradients over the ranks. A sum of losses times
    `factor` therefore ends as the sum over the step divided by its number of targets N, however unevenly the targets
    lie. N must be known before the first backward pass: the batch announces the share of its rank.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._announced: Tensor | None = None
        self._counted: Tensor | None = None

    def factor(
        self,
        batch: Mapping[str, Tensor],
        num_targets: Tensor,
        *,
        accumulate: int,
        num_ranks: int,
        last: bool,
        num_copies: int = 1,
    ) -> Tensor:
        """Return ``num_ranks * accumulate / N`` as a float32 scalar.

        Args:
            batch: its ``num_step_targets`` (int64 scalar) is what this rank has in the whole step.
            num_targets: valid targets of this micro-batch, int64 scalar.
            accumulate: micro-batches of a step; the last step of an epoch may have fewer.
            num_ranks: processes.
            last: whether the optimiser steps after this micro-batch.
            num_copies: processes that hold the same batch, and share its sequences.

        Raises:
            ValueError: nothing is announced though the step has several micro-batches, or the announced number is
                not what the step held.
        """
        announced = batch.get("num_step_targets")
        if announced is None and accumulate > 1:
            raise ValueError(
                f"the batch has no num_step_targets, which accumulate_grad_batches={accumulate} needs: "
                "use a datamodule of this suite, or accumulate_grad_batches=1"
            )
        if self._counted is None:
            self._announced = num_targets if announced is None else announced
            self._counted = torch.zeros_like(num_targets)
            self._total = self._announced.to(num_targets.device, torch.int64, copy=True)
            if num_ranks > 1:
                torch.distributed.all_reduce(self._total)
                self._total //= num_copies
        self._counted = self._counted + num_targets
        if last:
            self._compare()
        assert self._total is not None
        return num_ranks * accumulate / self._total.clamp(min=1).float()

    def _compare(self) -> None:
        """Look once per step: a wrong number would scale the gradient without a trace."""
        assert self._counted is not None and self._announced is not None
        counted, announced = int(self._counted), int(self._announced)
        self._counted = None
        if counted != announced:
            raise ValueError(
                f"num_step_targets announced {announced} targets for the optimiser step, its micro-batches held "
                f"{counted}: the batches of a step must come in order, with use_distributed_sampler=False"
            )
