"""The per-token loss as an operation of autograd: one `Function` in eager mode."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy.chunked import Options, backward, forward


class TokenNLL(torch.autograd.Function):
    """The chunked loss; keeps its inputs and one log-sum-exp a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
    ) -> Tensor:
        """Return ``[N]``."""
        nll, lse = forward(hidden, weight, bias, targets, options)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.options = options
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias."""
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            grads = backward((hidden, weight, bias), targets, lse, grad_nll, ctx.needs_input_grad[:3], ctx.options)
        return (*grads, None, None)
