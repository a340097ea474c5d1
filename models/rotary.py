"""Rotary positions at any places.

Legend: P positions, H heads, D head size.
"""

import torch
from torch import Tensor

from models.drt.encoder import rotate

__all__ = ["rotary_at", "rotate"]


def rotary_at(positions: Tensor, head_dim: int, *, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta ** (-2 i / D) at ``[..., P]``, both ``[..., P, 1, D / 2]``.

    In float32, or float64 where the positions are.
    """
    exact = torch.float64 if positions.dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact) / head_dim
    angle = positions.to(exact)[..., None, None] * theta**-exponent
    return angle.cos(), angle.sin()
