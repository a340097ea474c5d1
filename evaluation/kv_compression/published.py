"""Perplexity as published: over marked text, its stray blanks included, as the exponential of a mean of batch means.

Notable: for comparison with published figures only; `evaluation.kv_compression.exact` scores what compares methods.

Letters: N blocks, T tokens of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.kv_compression.exact import compression_of
from evaluation.scoring import perplexity_of
from losses.output_head import evaluation_mode
from patches.compressed_rows import Method, forward_under, label_nll, plain_rows
from patches.sentinel.layout import IGNORED, SpanLayout
from patches.sentinel.sentinels import Sentinels


@torch.no_grad()
def published_perplexity(
    model: nn.Module,
    blocks: Tensor,
    *,
    method: Method,
    compression_ratio: float,
    sentinels: Sentinels,
    keep: Tensor | None = None,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Score blocks as published.

    Args:
        model: causal LM.
        blocks: ``[N, T]``; for ``sentinel`` with sentinels in them, cut anywhere.
        method: ``sentinel``, ``local``, ``scattered`` or ``dense``.
        compression_ratio: nominal.
        sentinels: the marks in the blocks; they stay in every distribution.
        keep: bool ``[N, T]``, what ``scattered`` keeps.
        batch_size: blocks of a batch; the result depends on it.

    Returns:
        ``perplexity`` (exponential of the mean over batches of their mean losses), ``nll_sum``, ``num_targets``, and
        ``achieved_ratio`` (mean over blocks of the fraction of their tokens that the cache does not hold after them).
    """
    compression = compression_of(method, compression_ratio, blocks.shape[1], num_sinks=0)
    device, means, sums, counts, achieved = next(model.parameters()).device, [], [], 0, 0.0
    for first in range(0, len(blocks), batch_size):
        part = slice(first, first + batch_size)
        ids = blocks[part].to(device)
        layout = SpanLayout.from_ids(ids, sentinels) if method == "sentinel" else plain_rows(ids)
        kept = None if keep is None else keep[part].to(device)
        with evaluation_mode(model):
            logits = forward_under(model, layout, compression.rule(layout, keep=kept))
        labels = layout.published_labels if method == "sentinel" else layout.labels
        nll, number = float(label_nll(logits, labels).double().sum()), int((labels[:, 1:] != IGNORED).sum())
        means.append(nll / number)
        sums.append(nll)
        counts += number
        achieved += float(_removed(layout, method, kept, compression_ratio).sum())
    return {
        "perplexity": perplexity_of(math.fsum(means) / len(means)),
        "nll_sum": math.fsum(sums),
        "num_targets": counts,
        "achieved_ratio": achieved / len(blocks),
    }


def _removed(layout: SpanLayout, method: Method, keep: Tensor | None, compression_ratio: float) -> Tensor:
    """Fraction of tokens ``[B]`` that a query right after a block does not see."""
    size = layout.kind.shape[1]
    if method == "sentinel":
        return layout.achieved_ratio
    if keep is not None:
        return 1 - keep.double().mean(1)
    hidden = int(size * compression_ratio) / size if method == "local" else 0.0
    return torch.full((layout.kind.shape[0],), hidden, dtype=torch.float64)
