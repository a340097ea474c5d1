"""Choose the path of an attention call: fused kernels where the numbers allow it, else tiles."""

from typing import Literal

from torch import Tensor

from patches.parallel_context.fused import attend_fused, fused_problem
from patches.parallel_context.problem import Attended, Problem, Want
from patches.parallel_context.tiled import attend_tiled

Implementation = Literal["auto", "grouped", "eager"]
IMPLEMENTATIONS = ("auto", "grouped", "eager")


def attend(problem: Problem, wants: frozenset[Want], implementation: Implementation) -> Attended:
    """Attend by the path of an implementation.

    "grouped": fused kernels merged by their log-sum-exps wherever no single weight is needed; "auto": the same, except
    for single query tokens, where a kernel call per group costs more than the logits; "eager": always tiles.
    """
    alone = implementation == "auto" and problem.query.shape[2] == 1
    if implementation == "eager" or alone or fused_problem(problem, wants) is not None:
        return attend_tiled(problem, wants)
    return attend_fused(problem, wants)


def visible_window(window: int | None, greatest: float, least: float) -> int | None:
    """Return the window, or None if no key is so far behind any query.

    Args:
        window: Window of the layer.
        greatest: Greatest position of a query.
        least: Least position of a key.
    """
    return None if window is None or greatest - least < window else window


def last_valid(hidden: Tensor, lengths: list[int]) -> Tensor:
    """Return the last valid hidden state of every row: ``[B, M]`` of ``[B, T, M]``."""
    index = hidden.new_tensor([length - 1 for length in lengths]).long()
    return hidden[range(len(lengths)), index]
