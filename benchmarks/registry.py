"""The list of benchmark cases, and the row each measurement leaves.

A case is a function that yields rows; one decorator registers it:

    @case("A1", group="gca")
    def forward() -> Iterator[Row]:
        ...
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch


@dataclass(frozen=True)
class Row:
    """One comparison: ours against a peer or a limit."""

    shape: str
    measure: str
    """What is compared, with its unit: "CPU s", "bytes"."""
    ours: float
    peer: str
    other: float
    target: float
    better: Literal["higher", "lower"] = "higher"
    """Whether `ratio` = other / ours must reach the target (higher) or ours / other stay below it (lower)."""
    floor: float | None = None
    """The ratio below (or above) which a change is refused; None = the target is a wish."""

    @property
    def ratio(self) -> float:
        """Times faster (or smaller) than the peer; for "lower" the share of it that we use."""
        return self.other / self.ours if self.better == "higher" else self.ours / self.other

    def reaches(self, limit: float) -> bool:
        """Say whether the ratio is on the right side of a limit."""
        return self.ratio >= limit if self.better == "higher" else self.ratio <= limit

    @property
    def broken(self) -> bool:
        """Say whether the row lies below its floor."""
        return self.floor is not None and not self.reaches(self.floor)


@dataclass(frozen=True)
class Case:
    """A registered case."""

    id: str
    group: str
    device: Literal["cpu", "cuda"]
    run: Callable[[], Iterator[Row]]
    needs: str | None = None
    """A package without which the case is left out."""

    def problem(self) -> str | None:
        """Say why the case cannot run here; None if it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA device"
        if self.needs is not None and find_spec(self.needs) is None:
            return f"needs {self.needs} (pip install --no-build-isolation -r requirements-gpu.txt)"
        return None


CASES: list[Case] = []


def case(
    id: str, *, group: str, device: Literal["cpu", "cuda"] = "cpu", needs: str | None = None
) -> Callable[[Callable[[], Iterator[Row]]], Callable[[], Iterator[Row]]]:
    """Register a function that yields rows under the id of its case."""

    def register(run: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        if any(known.id == id for known in CASES):
            raise ValueError(f"benchmark case {id!r} is registered twice")
        CASES.append(Case(id, group, device, run, needs))
        return run

    return register
