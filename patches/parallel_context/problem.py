"""One attention call over grouped keys, and what it may return.

Legend: B batch, H heads, G kv heads, T query tokens, N key slots, M own slots, D head size, K pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from patches.parallel_context.key_groups import Block, KeyPart, find_blocks
from patches.parallel_context.options import APE, SelectiveAttention

Want = Literal["entropy", "mass", "group_scores", "logit_scale", "cosine", "columns"]
MEGABYTE = 2**20
# Logits held at a time on a CPU: about the second-level cache. GPUs take the whole workspace.
CPU_TILE = 2**18


@dataclass(frozen=True)
class Own:
    """The query tokens' own keys: causal, the last query token sees all of them."""

    keys: Tensor
    """``[B, G, M, D]``."""
    values: Tensor
    valid: Tensor | None = None
    """``[B, M]``, False for slots that hold nothing; None: all valid (or invisible to all valid queries)."""
    causal: bool = True
    positions: Tensor | None = None
    """``[B, M]``, needed where a window measures distances."""
    host_positions: Tensor | None = None
    """The same on the host, where they never decrease: lets a window skip keys."""


@dataclass(frozen=True)
class Problem:
    """Queries, their context and their own keys, and the rule that weighs them."""

    query: Tensor
    """``[B, H, T, D]``."""
    context: tuple[KeyPart, ...]
    own: Own
    scale: float
    num_pieces: tuple[int, ...]
    """Pieces of each row."""
    softcap: float | None = None
    window: int | None = None
    """Keys whose position is this far behind, or more, are hidden."""
    positions: Tensor | None = None
    """``[B, T]`` of the queries."""
    selection: SelectiveAttention | None = None
    scores: Tensor | None = None
    """Aggregated scores ``[B, H or 1, T or 1, K]`` that replace those found here."""
    ape: APE | None = None
    workspace: int = 256 * MEGABYTE
    """Bytes of the largest temporary."""
    observed: Tensor | None = None
    """``[B, T]`` rows whose weights "columns" sums."""
    blocks: Sequence[Block] | None = field(default=None, compare=False)
    """The blocks of `context` in detail, where the caller keeps them."""

    @property
    def most_pieces(self) -> int:
        """K."""
        return max(self.num_pieces, default=0)

    @property
    def dtype(self) -> torch.dtype:
        """Type of logits and statistics: float32 or better."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def tile(self) -> int:
        """Logits held at a time."""
        budget = self.workspace // self.dtype.itemsize
        return min(budget, CPU_TILE) if self.query.device.type == "cpu" else budget

    def detailed_blocks(self) -> Sequence[Block]:
        """Return the blocks that tell pieces apart."""
        if self.blocks is not None:
            return self.blocks
        return find_blocks(self.context, self.num_pieces, self.own.keys.shape[1])

    def last_rows(self, count: int) -> "Problem":
        """Return the problem of the last ``count`` query tokens."""
        first = self.query.shape[2] - count
        scores = self.scores
        return replace(
            self,
            context=tuple(part.last_rows(count) for part in self.context),
            query=self.query[:, :, first:],
            positions=None if self.positions is None else self.positions[:, first:],
            observed=None if self.observed is None else self.observed[:, first:],
            scores=scores[:, :, first:] if scores is not None and scores.shape[2] > 1 else scores,
        )


@dataclass
class Attended:
    """What an attention call found; statistics are float32 or better, None unless wanted."""

    output: Tensor
    """``[B, H, T, D]`` in the dtype of the query."""
    lse: Tensor
    """``[B, H, T]``."""
    entropy: Tensor | None = None
    """``[B, H, T]``."""
    mass: Tensor | None = None
    """``[B, H, T, K + 2]``."""
    group_scores: Tensor | None = None
    """``[B, H, T, K]``, before selection."""
    logit_scale: Tensor | None = None
    """``[B, H, T]``."""
    cosine: Tensor | None = None
    """``[B, H, T]``."""
    columns: Tensor | None = None
    """``[B, H, N + M]``: weights on all slots, own ones last, summed over the observed rows."""


def empty_result(problem: Problem, wants: frozenset[Want]) -> Attended:
    """Allocate what is wanted, zero where rows or groups may be missing."""
    batch, heads, tokens, _ = problem.query.shape
    device, pieces = problem.query.device, problem.most_pieces

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, dtype=problem.dtype, device=device)

    slots = sum(part.keys.shape[2] for part in problem.context) + problem.own.keys.shape[2]
    return Attended(
        output=torch.empty_like(problem.query, memory_format=torch.contiguous_format),
        lse=zeros(tokens),
        entropy=zeros(tokens) if "entropy" in wants else None,
        mass=zeros(tokens, pieces + 2) if "mass" in wants else None,
        group_scores=zeros(tokens, pieces) if "group_scores" in wants else None,
        logit_scale=zeros(tokens) if "logit_scale" in wants else None,
        cosine=zeros(tokens) if "cosine" in wants else None,
        columns=zeros(slots) if "columns" in wants else None,
    )
