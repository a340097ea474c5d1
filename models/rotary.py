"""Rotary positions at any places.

Legend: P positions, H heads, D head size.
"""

import torch
from torch import Tensor


def rotary_at(positions: Tensor, head_dim: int, *, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta ** (-2 i / D) at ``[..., P]``, both ``[..., P, 1, D / 2]``.

    In float32, or float64 where the positions are.
    """
    exact = torch.float64 if positions.dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact) / head_dim
    angle = positions.to(exact)[..., None, None] * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of ``[B, P, H, D]`` by the angles of ``table``."""
    cos, sin = table
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
