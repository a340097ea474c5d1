"""Negative log-likelihoods of targets under hidden states, in chunks of the vocabulary projection.

Legend: B batch, T query tokens, M model width, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patches.parallel_context.hook import ModelHook
from patches.parallel_context.inputs import IGNORE_INDEX


@dataclass(frozen=True)
class ScoreResult:
    """Scores of a batch of queries."""

    nll: Tensor
    """``[B, T]`` nats, 0 where nothing is scored; float32 or better."""
    mask: Tensor
    """``[B, T]``, True where a target is scored."""
    nll_sum: Tensor
    """``[B]`` float64."""
    num_targets: Tensor
    """``[B]`` int64."""
    logits: Tensor | None
    """``[B, T, V]`` if asked for; arbitrary at padding."""
    meters: dict[str, Tensor]

    @property
    def perplexity(self) -> float:
        """Exponential of the mean NLL over all targets of the batch."""
        count = int(self.num_targets.sum())
        return math.exp(float(self.nll_sum.sum()) / count) if count else math.nan


def score_hidden(
    hook: ModelHook, hidden: Tensor, targets: Tensor, *, return_logits: bool, workspace: int
) -> tuple[Tensor, Tensor | None]:
    """Return the NLL ``[B, T]`` of targets (-100 ignored), and the logits ``[B, T, V]`` if asked for.

    Only scored rows are projected to the vocabulary, unless all logits are asked for.

    Args:
        hook: The model.
        hidden: ``[B, T, M]``.
        targets: ``[B, T]`` on the host.
        return_logits: Whether to project every row.
        workspace: Bytes of the logits held at a time.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    chosen = torch.ones_like(targets, dtype=torch.bool) if return_logits else targets != IGNORE_INDEX
    rows = hidden[chosen.to(hidden.device)]
    wanted = targets[chosen].to(hidden.device)
    nll = torch.zeros(len(rows), dtype=acc, device=hidden.device)
    kept: Tensor | None = None
    step = max(1, workspace // (acc.itemsize * hook.config.vocab_size))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        logits = hook.logits(rows[part])
        exact = logits.to(acc)
        scored = wanted[part] != IGNORE_INDEX
        value = torch.logsumexp(exact, -1) - exact.gather(-1, wanted[part].clamp_min(0)[:, None]).squeeze(-1)
        nll[part] = torch.where(scored, value, 0.0)
        if return_logits:
            kept = logits.new_empty(len(rows), logits.shape[-1]) if kept is None else kept
            kept[part] = logits
    full = torch.zeros(targets.shape, dtype=acc, device=hidden.device)
    full[chosen.to(hidden.device)] = nll
    return full, None if kept is None else kept.view(*targets.shape, -1)
