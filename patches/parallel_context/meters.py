"""What to measure while the query is read and tokens are generated; every token weighs the same.

Legend: L layers, B batch, H heads, T query tokens (and generated ones), K pieces, D head size.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patches.parallel_context.problem import Attended, Want

METERS = (
    "entropy",
    "mass",
    "group_scores",
    "mass_per_token",
    "query_norm",
    "output_norm",
    "logit_scale",
    "cosine",
)
_FOUND: dict[str, Want] = {
    "entropy": "entropy",
    "mass": "mass",
    "mass_per_token": "mass",
    "group_scores": "group_scores",
    "logit_scale": "logit_scale",
    "cosine": "cosine",
}


def check_meters(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names as a tuple; raise a ValueError on an unknown one."""
    if isinstance(names, str):
        raise ValueError(f"meters is a list of names, got the string {names!r}")
    chosen = tuple(names)
    for name in chosen:
        if name not in METERS:
            raise ValueError(f"unknown meter {name!r}, use some of {', '.join(METERS)}")
    return chosen


@dataclass
class Recorder:
    """Collects statistics layer by layer and call by call."""

    meters: tuple[str, ...]
    num_layers: int
    _calls: list[dict[str, list[Tensor]]] = field(default_factory=list)
    _valid: list[Tensor] = field(default_factory=list)

    @property
    def wants(self) -> frozenset[Want]:
        """Statistics that the attention calls must return."""
        return frozenset(_FOUND[name] for name in self.meters if name in _FOUND)

    def start(self, valid: Tensor) -> None:
        """Begin a forward call whose tokens ``[B, T]`` count where True."""
        self._calls.append({name: [] for name in self.meters})
        self._valid.append(valid.cpu())

    def add(self, query: Tensor, found: Attended) -> None:
        """Take the statistics of the next layer: its queries ``[B, H, T, D]`` and what they found."""
        if not self.meters:
            return
        acc = torch.promote_types(query.dtype, torch.float32)
        for name, layers in self._calls[-1].items():
            if name == "query_norm":
                value = torch.linalg.vector_norm(query, dim=-1, dtype=acc)
            elif name == "output_norm":
                value = torch.linalg.vector_norm(found.output, dim=-1, dtype=acc)
            else:
                value = getattr(found, _FOUND[name])
            layers.append(value.cpu())

    def results(self) -> dict[str, Tensor]:
        """Return ``[L, B, H, T]`` (``[..., K + 2]`` or ``[..., K]`` for groups), NaN where no token is.

        "mass" is the mean over the tokens of a row: ``[L, B, H, K + 2]``.
        """
        found = {}
        for name in self.meters:
            value = torch.cat([torch.stack(call[name]) for call in self._calls], 3)
            valid = torch.cat(self._valid, 1)[None, :, None]
            valid = valid[..., None] if value.dim() == 5 else valid
            if name == "mass":
                found[name] = (value * valid).sum(3) / valid.sum(3)
            else:
                found[name] = value.masked_fill(~valid, float("nan"))
        return found
