"""Score the end of a text behind the rest of it, cut in pieces: what the sweep and the validation callback share.

Legend: B rows, T query tokens, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class TailCut:
    """Where a row ends as context and begins as query.

    Attributes:
        keep_tail: the last tokens of a row, which are scored.
        unsplit: tokens before them that are query too, and only predict.

    Raises:
        ValueError: a number below 1.
    """

    keep_tail: int = 1024
    unsplit: int = 1

    def __post_init__(self) -> None:
        for name in ("keep_tail", "unsplit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def num_query_tokens(self) -> int:
        """Tokens of a row that no piece holds."""
        return self.keep_tail + self.unsplit

    def cut(self, row: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return context and query of a row.

        Raises:
            ValueError: no token is left for the context.
        """
        tokens = list(row)
        if len(tokens) <= self.num_query_tokens:
            raise ValueError(
                f"a row of {len(tokens)} tokens has no context before its last {self.num_query_tokens} "
                f"(keep_tail={self.keep_tail}, unsplit={self.unsplit}): lower keep_tail or take longer rows"
            )
        return tokens[: -self.num_query_tokens], tokens[-self.num_query_tokens :]

    def targets(self, query: Sequence[int]) -> list[int]:
        """Return the token predicted at each place of a query, -100 where none is scored."""
        return [IGNORE_INDEX] * (self.unsplit - 1) + list(query[self.unsplit :]) + [IGNORE_INDEX]


def score_tails(
    bound: Any,
    contexts: Sequence[Sequence[Sequence[int]]],
    queries: list[list[int]],
    *,
    cut: TailCut,
    meet: Callable[[], None] = lambda: None,
) -> Tensor:
    """Score the tails of B rows behind their pieces.

    Args:
        bound: a bound `patches.parallel_context.ParallelContext`.
        contexts: the pieces of each row.
        queries: the query of each row.
        cut: which query tokens are scored.
        meet: called after the contexts are encoded and after the queries are scored.

    Returns:
        ``[B, 3]`` float64 on the host: summed NLL, number of targets, and the summed entropy (nats; the mean over
        layers and heads) of the rows of attention that predict them.
    """
    state = bound.encode(contexts, query_ids=queries)
    meet()
    found = bound.score(state, queries, [cut.targets(query) for query in queries], meters=("entropy",))
    meet()
    scored = found.mask.cpu()
    entropy = found.meters["entropy"].double().mean((0, 2))  # [B, T]
    sums = (found.nll_sum.cpu(), scored.sum(1).double(), torch.where(scored, entropy, 0.0).sum(1))
    return torch.stack(sums, 1)
