"""Next-token cross entropy in float32 that keeps no copy of the logits.

The gradient is formed from the logits and one number per row, in blocks of rows, so that beside logits and their
gradient (both in the dtype of the logits) only one block is ever held in float32.

Legend: B batch, T tokens, V vocabulary, N rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}


def counted_targets(labels: Tensor, document_numbers: Tensor | None) -> Tensor:
    """Return the target of every position, ``[B, T]``: the next label, -100 where none counts.

    Args:
        labels: Un-shifted labels ``[B, T]``, -100 ignored.
        document_numbers: ``[B, T]``, -1 = padding; a target counts only inside the document of its predecessor.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if document_numbers is None:
        return targets
    following = F.pad(document_numbers[:, 1:], (0, 1), value=-1)
    return targets.masked_fill((document_numbers != following) | (document_numbers < 0), IGNORED)


def next_token_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Return the float32 cross entropy of ``[B, T, V]`` against ``[B, T]``.

    loss = sum of -log softmax(logits)[target] / number of counted targets (or ``num_items``); 0 without targets.
    """
    total = SummedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    count = (targets != IGNORED).sum().clamp_min(1) if num_items is None else num_items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


class SummedCrossEntropy(torch.autograd.Function):
    """sum_n of logsumexp(x_n) - x_n[t_n] over rows with a target; gradient softmax(x_n) - onehot(t_n)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over ``[N, V]`` with targets ``[N]``, -100 ignored."""
        counted = targets != IGNORED
        index = targets.clamp_min(0)[:, None]
        chosen = logits.gather(1, index).squeeze(1).float()
        normaliser = torch.cat([block.float().logsumexp(1) for block in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, index, counted, normaliser)
        return torch.where(counted, normaliser - chosen, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Fill the gradient of the logits block by block."""
        logits, index, counted, normaliser = ctx.saved_tensors
        out, rows = torch.empty_like(logits), _rows(logits)
        factor = torch.where(counted, gradient, 0.0)
        pieces = (tensor.split(rows) for tensor in (out, logits, index, normaliser, factor))
        for target, block, chosen, total, weight in zip(*pieces, strict=True):
            share = (block.float() - total[:, None]).exp_()
            share.scatter_(1, chosen, share.gather(1, chosen) - 1)
            torch.mul(share, weight[:, None], out=share)
            target.copy_(share)
        return out, None


def _rows(logits: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS.get(logits.device.type, 1 << 24) // logits.shape[1])
