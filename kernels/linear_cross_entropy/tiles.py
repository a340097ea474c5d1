"""One tile of logits in plain PyTorch: its part of the log-sum-exp, and its gradient.

Legend: M model width, S rows of a tile, U vocabulary entries of a tile.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear_cross_entropy.products import product

LOG2E = math.log2(math.e)  # PyTorch's exp2 is three times faster than its exp on a CPU


@dataclass(frozen=True)
class Tile:
    """What the logits of a tile are made of."""

    hidden: Tensor
    """``[S, M]``."""
    entries: Tensor
    """``[U, M]`` of the weight, in the dtype of ``hidden``."""
    bias: Tensor | None
    """``[U]`` in the dtype of the logits."""
    targets: Tensor
    """``[S]`` number of the target within the tile; outside [0, U) if it is elsewhere."""
    softcap: float | None

    def inside(self) -> Tensor:
        """Tell which targets lie in this tile, bool ``[S]``."""
        return (self.targets >= 0) & (self.targets < len(self.entries))

    def read(self, z: Tensor) -> Tensor:
        """Read ``z`` ``[U, S]`` (any dtype) at the targets, ``[S]``; means nothing where the target is elsewhere."""
        return z.gather(0, self.targets.clamp(0, len(self.entries) - 1)[None])[0]

    def write(self, z: Tensor, values: Tensor | float) -> None:
        """Write values ``[S]`` into ``z`` ``[U, S]`` at the targets in this tile; the device is not waited for."""
        values = torch.where(self.inside(), values, self.read(z))
        z.scatter_(0, self.targets.clamp(0, len(self.entries) - 1)[None], values[None])


@dataclass(frozen=True)
class Running:
    """The log-sum-exp of rows so far, updated in place: ``peak + log(total)``, each ``[S]``."""

    peak: Tensor
    total: Tensor
    chosen: Tensor
    """Logit of the target."""

    def __getitem__(self, rows: slice) -> "Running":
        return Running(self.peak[rows], self.total[rows], self.chosen[rows])


def _logits(tile: Tile, shift: Tensor | None = None) -> Tensor:
    """Compute the logits ``[U, S]``, plus a shift ``[S]``."""
    plain = tile.bias is None and tile.softcap is None
    z = product(tile.entries, tile.hidden, shift if plain else None)
    if tile.bias is not None:
        z.add_(tile.bias[:, None])
    if tile.softcap is not None:
        z.div_(tile.softcap).tanh_().mul_(tile.softcap)
    return z if plain or shift is None else z.add_(shift)


def _slope(z: Tensor, softcap: float) -> Tensor:
    """Differentiate the softcap at its results."""
    return (z / softcap).square_().neg_().add_(1.0)


def accumulate(tile: Tile, running: Running, keep: bool) -> Tensor | None:
    """Update the log-sum-exps.

    With `keep`, returns ``exp(z - peak)`` ``[U, S]`` as an operand: 0 at the targets, times the slope of the softcap.
    """
    z = _logits(tile)
    running.chosen.copy_(torch.where(tile.inside(), tile.read(z), running.chosen))
    slope = _slope(z, tile.softcap) if keep and tile.softcap is not None else None
    peak = torch.maximum(running.peak, z.amax(0))
    z.sub_(peak).mul_(LOG2E).exp2_()
    running.total.mul_(torch.exp(running.peak - peak)).add_(z.sum(0))
    running.peak.copy_(peak)
    if not keep:
        return None
    tile.write(z, 0.0)
    return (z if slope is None else z.mul_(slope)).to(tile.hidden.dtype)


def differentiate(tile: Tile, lse: Tensor, upstream: Tensor) -> Tensor:
    """Compute ``dz = (softmax - onehot) g``, times the slope of the softcap, ``[U, S]`` in the dtype of the logits.

    ``lse`` and ``upstream`` (g) are ``[S]`` in that dtype, float32 or float64.
    """
    z = _logits(tile, -lse)
    slope = None if tile.softcap is None else _slope(z + lse, tile.softcap)
    z.mul_(LOG2E).exp2_()
    tile.write(z, tile.read(z) - 1.0)
    z.mul_(upstream)
    return z if slope is None else z.mul_(slope)
