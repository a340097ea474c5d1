"""Drop context slots that soak up attention, head by head, in some layers.

Legend: G kv heads, N context slots.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from patches.parallel_context.checks import check_choice, check_count, check_share

KINDS = ("sink", "recent", "middle", "all")


@dataclass(frozen=True)
class Calibration:
    """Remove slots whose attention lies above a threshold, in layers i..j inclusive, during the query (2502.14317).

    A quantile q is taken of the attention of each kv head on its N context slots: the value of rank floor(q (N - 1)),
    the lowest being 0. At most the N - 1 - floor(q (N - 1)) slots above it are abnormal, whatever the length.
    """

    kind: Literal["sink", "recent", "middle", "all"] = "sink"
    """Region: the first `margin` slots, the last `margin`, those between, or all."""
    layers: tuple[int, int] = (1, 8)
    threshold: float = 0.1
    rows: int = 1
    """Last query rows whose mean attention is judged; 0: all."""
    margin: int = 100
    apply: Literal["pass", "cache"] = "pass"
    """"pass": from the query pass on, which is recomputed; "cache": while decoding only."""
    threshold_kind: Literal["absolute", "quantile"] = "absolute"
    """Whether `threshold` is an attention weight, or a quantile of the weights of each head."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.layers) != 2:
            raise ValueError(f"layers are the first and the last one, got {self.layers}")
        for layer in self.layers:
            check_count("layers", layer, 0)
        if self.layers[0] > self.layers[1]:
            raise ValueError(f"layers are the first and the last one, in this order, got {self.layers}")
        check_share("threshold", self.threshold)
        check_count("rows", self.rows, 0)
        check_count("margin", self.margin, 0)
        check_choice("apply", self.apply, ("pass", "cache"))
        check_choice("threshold_kind", self.threshold_kind, ("absolute", "quantile"))

    def abnormal(self, attention: Tensor) -> Tensor:
        """Say which slots of ``[..., N]`` lie above the threshold inside the region."""
        place, length = torch.arange(attention.shape[-1], device=attention.device), attention.shape[-1]
        region = {
            "sink": place < self.margin,
            "recent": place > length - self.margin,
            "middle": (place > self.margin) & (place < length - self.margin),
            "all": place >= 0,
        }[self.kind]
        return (attention > self._bound(attention)) & region

    def _bound(self, attention: Tensor) -> Tensor | float:
        """Return what abnormal slots of ``[..., N]`` exceed: a number, or one of each head ``[..., 1]``."""
        if self.threshold_kind == "absolute" or not attention.numel():
            return self.threshold
        # Exact, because in binary floating point 0.29 x 100 lies below 29.
        rank = int(Fraction(str(self.threshold)) * (attention.shape[-1] - 1))
        return attention.kthvalue(rank + 1, -1, keepdim=True).values

    def keep(self, attention: Tensor) -> Tensor:
        """Choose the slots to keep; every head loses as many as the head with most abnormal slots.

        Heads with fewer abnormal slots also lose their lowest-attention slots (ties: the earlier).

        Args:
            attention: ``[G, N]`` attention on the context slots.

        Returns:
            ``[G, N - m]`` int64, ascending.
        """
        abnormal = self.abnormal(attention)
        lost = int(abnormal.sum(-1).max()) if abnormal.numel() else 0
        order = torch.sort(attention.masked_fill(abnormal, float("-inf")), dim=-1, stable=True).indices
        return order[:, lost:].sort(-1).values
