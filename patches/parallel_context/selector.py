"""Piece scores that reach beyond one tile: aggregated, from two passes, or with momentum.

Legend: L layers, B batch, H heads, T query tokens, K pieces.
"""

import torch
from torch import Tensor

from patches.parallel_context.options import SelectiveAttention
from patches.parallel_context.policies import aggregate_scores, selects
from patches.parallel_context.problem import Problem
from patches.parallel_context.tiled import collect_scores


class Selector:
    """Aggregated scores of every layer, call by call of one generation."""

    def __init__(self, selection: SelectiveAttention | None, num_pieces: tuple[int, ...]) -> None:
        self.selection = selection if any(selects(selection, number) for number in num_pieces) else None
        self._collected: list[Tensor] | None = None
        self._shared: list[Tensor] = []
        self._before: dict[int, Tensor] = {}
        self._newest: dict[int, Tensor] = {}

    @property
    def two_pass(self) -> bool:
        """Whether every call is run twice."""
        return self.selection is not None and self.selection.two_pass

    def begin_first_pass(self) -> None:
        """Collect plain scores in the next forward pass, which runs without selection."""
        self._collected = []

    def end_first_pass(self, lengths: list[int]) -> None:
        """Aggregate what the first pass collected."""
        assert self.selection is not None and self._collected is not None
        stacked = torch.stack([scores.to(self._collected[0].device) for scores in self._collected])
        shared = self._aggregate(stacked, lengths)
        self._shared = list(shared.expand(len(stacked), *shared.shape[1:]))
        self._collected = None

    def begin(self) -> None:
        """Begin a call: momentum mixes in what the call before used, however often layers attend in this one."""
        self._before |= self._newest

    def prepare(
        self, layer: int, problem: Problem, lengths: list[int]
    ) -> tuple[SelectiveAttention | None, Tensor | None]:
        """Return the selection and the scores ``[B, H, T, K]`` of a layer's call; None where tiles find their own."""
        selection = self.selection
        if selection is None:
            return None, None
        if self._collected is not None:
            self._collected.append(collect_scores(problem, selection.score_top_k))
            return None, None
        if selection.two_pass:
            scores = self._shared[layer].to(problem.query.device)
        elif selection.aggregate or selection.momentum:
            found = collect_scores(problem, selection.score_top_k)
            scores = self._aggregate(found, lengths)
        else:
            return selection, None
        return selection, self._smooth(layer, scores, lengths)

    def _aggregate(self, scores: Tensor, lengths: list[int]) -> Tensor:
        """Aggregate ``[..., B, H, T, K]`` row by row over the valid tokens; the layers of two passes come first."""
        selection = self.selection
        assert selection is not None
        rows = []
        for row, length in enumerate(lengths):
            found = scores[..., row, :, :, :]
            valid = found[..., : max(length, 1), :] if "query" in selection.aggregate else found
            rows.append(aggregate_scores(valid, selection.aggregate, selection.aggregate_top_k))
        return torch.stack(rows, -4)

    def _smooth(self, layer: int, scores: Tensor, lengths: list[int]) -> Tensor:
        """Mix in the mean over the tokens of the scores used by the call before."""
        assert self.selection is not None
        momentum = self.selection.momentum
        if not momentum:
            return scores
        if layer in self._before:
            scores = momentum * self._before[layer] + (1 - momentum) * scores
        means = [
            row[:, : max(length, 1)].mean(1, keepdim=True) if row.shape[1] > 1 else row
            for row, length in zip(scores, lengths, strict=True)
        ]
        self._newest[layer] = torch.stack(means)
        return scores
