"""Skip an optimiser step whose loss or gradient is not finite, on all ranks together; give up after several."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NonFiniteSteps:
    """Watch the losses of a step and drop its gradient when one of them is infinite or not a number.

    An optimiser leaves parameters without a gradient alone: neither weights nor moments change.

    Args:
        max_in_row: skipped steps in a row after which training stops.

    Attributes:
        skipped: steps skipped so far.
    """

    def __init__(self, max_in_row: int):
        self.max_in_row, self.skipped, self._in_row = max_in_row, 0, 0
        self._bad: Tensor | None = None

    def watch(self, loss: Tensor) -> None:
        """Note a micro-batch, without waiting for its value."""
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad

    def end_step(self, parameters: Iterable[nn.Parameter], grad_norm: Tensor, *, can_skip: bool = True) -> None:
        """Decide over all ranks; to be called with the gradients of the step complete. The host waits here once.

        Args:
            parameters: whose gradients are dropped.
            grad_norm: norm of all gradients, also of those that are spread over processes.
            can_skip: whether dropping them keeps the optimiser from stepping.

        Raises:
            ValueError: too many skipped steps in a row, or one that cannot be skipped.
        """
        bad = ~torch.isfinite(grad_norm)
        flag = (bad if self._bad is None else bad | self._bad.to(bad.device)).float()
        self._bad = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if not flag.item():
            self._in_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self._in_row += 1
        if self._in_row >= self.max_in_row or not can_skip:
            engine = "" if can_skip else ", which this engine cannot skip"
            raise ValueError(
                f"the loss or the gradient was not finite in {self._in_row} steps in a row{engine}: lower the learning "
                "rate, or look at the data and the scores"
            )
