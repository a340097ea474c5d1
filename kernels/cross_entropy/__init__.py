"""Cross entropy of rows of logits in float32, block by block: one public function.

Notable: beside the logits and their gradient, both in the dtype of the logits, only one block is ever held in float32;
nothing but the logits is kept for the backward, which forms the softmax again.

Legend: N rows, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["logit_nll"]

# Logits of a block: the cache of a CPU; on a GPU few, large launches (256 MiB of float32).
BLOCK = {"cpu": 2**18, "cuda": 2**26}


def logit_nll(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Compute ``nll[n] = logsumexp(logits[n]) - logits[n, targets[n]]``, 0 where ignored.

    All arithmetic is float32 (float64 for float64 logits), whatever autocast says. Ignored rows have no influence,
    whatever they hold, and get a gradient of exactly 0. Differentiable once.

    Args:
        logits: ``[N, V]``, any floating dtype.
        targets: ``[N]`` int64 in ``[0, V)``, which is not checked, or `ignore_index`.
        ignore_index: target whose rows give exactly 0.

    Returns:
        ``[N]`` float32 (float64 for float64 logits).

    Raises:
        ValueError: on shapes that do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [N, V] and targets [N], got {list(logits.shape)} and {list(targets.shape)}")
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0)
    nll: Tensor = _BlockwiseNLL.apply(logits, index, ignored)
    return nll


class _BlockwiseNLL(torch.autograd.Function):
    """``[N]`` of logits ``[N, V]``, targets ``[N]`` inside the vocabulary, and which rows are ignored ``[N]``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, ignored: Tensor) -> Tensor:
        ctx.save_for_backward(logits, index, ignored)
        nll = torch.empty(index.shape, dtype=_accumulator(logits), device=logits.device)
        for out, block, target in _blocks(logits, nll, logits, index):
            out.copy_(F.cross_entropy(block.to(out.dtype), target, reduction="none"))
        return nll.masked_fill_(ignored, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, index, ignored = ctx.saved_tensors
        result = torch.empty_like(logits)
        for out, block, target, factor in _blocks(logits, result, logits, index[:, None], gradient[:, None]):
            share = torch.softmax(block, 1, dtype=factor.dtype)
            share.scatter_add_(1, target, share.new_full(target.shape, -1.0))
            out.copy_(share.mul_(factor))
        # What they hold may be NaN. Indexing touches these rows alone, but on a GPU it would wait for the device.
        if result.is_cuda:
            result.masked_fill_(ignored[:, None], 0.0)
        else:
            result[ignored] = 0.0
        return result, None, None


def _blocks(logits: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of all tensors ``[N, ...]``, as many at a time as fill a block of logits."""
    elements = BLOCK.get(logits.device.type, BLOCK["cpu"])
    rows = max(1, elements // max(1, logits.shape[1]))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
