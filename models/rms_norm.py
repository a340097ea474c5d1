"""RMSNorm in float32, whatever the dtype of its input and of autocast.

Legend: M model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), computed in float32 and returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``[..., M]``."""
        if x.is_cpu and x.dtype != torch.float64:
            return _CPUNorm.apply(x, self.weight, self.eps)
        # A fused kernel on CUDA; on the CPU the same call falls apart into a dozen passes over memory.
        exact = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(exact), self.weight.shape, self.weight.to(exact), self.eps).to(x.dtype)


class _CPUNorm(torch.autograd.Function):
    """With n = x r, r = (mean(x^2) + eps)^-1/2: dx = r (g w - n mean(g w n)), dw = sum g n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.float()
        power = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = power.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        gradient, factor = gradient.float(), weight.float()
        normed = x.float() * scale
        product = gradient * normed
        to_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (product @ factor).div_(x.shape[-1])
        to_input = (gradient * factor).sub_(normed.mul_(mean[..., None])).mul_(scale)
        return to_input.to(x.dtype), to_weight, None


def product_input(x: Tensor) -> Tensor:
    """Cast the input ``[..., M]`` of several linear maps once; autocast would cast it for each of them."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
