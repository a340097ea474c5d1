"""Next-token negative log-likelihood per position, with the sum left to the caller.

B batch, T tokens, V vocabulary, N = B T rows.

Notable: the rows are worked on in blocks, so neither the forward nor the backward pass ever holds a second
[N, V] float32 tensor. Nothing but the logits themselves is kept for the backward pass; the softmax is formed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def next_token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    next_token: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of the token that follows each position.

    ``nll[b, t] = logsumexp(logits[b, t]) - logits[b, t, y]`` with ``y = labels[b, t + 1]``, and for the last position
    ``y = next_token[b]``. All arithmetic is float32 whatever autocast says (float64 for float64 logits).

    Args:
        logits: ``[B, T, V]``, any floating dtype.
        labels: ``[B, T]`` int64, not shifted; -100 marks targets that do not count.
        next_token: ``[B]`` int64, the target of the last position (-100 for none). Without it the last position does
            not count.
        document_ids: ``[B, T]`` integers; a target in another document than its predecessor does not count. Whether
            ``next_token`` belongs to the last document is the caller's knowledge: pass -100 where it does not.

    Returns:
        ``nll`` ``[B, T]`` float32, 0 where nothing counts, and ``counted`` ``[B, T]`` bool. Logits of positions that
        do not count have no influence, whatever they hold, and get a gradient of exactly 0.

    Raises:
        ValueError: shapes do not agree, or (checked on CPU tensors only) a target is not in the vocabulary.
    """
    _check_shapes(logits, labels, next_token, document_ids)
    last = labels.new_full((labels.shape[0],), IGNORE_INDEX) if next_token is None else next_token.to(labels)
    targets = torch.cat([labels[:, 1:], last[:, None]], dim=1)
    counted = targets != IGNORE_INDEX
    if document_ids is not None:
        same = document_ids[:, 1:] == document_ids[:, :-1]
        counted = counted & F.pad(same, (0, 1), value=True)
    targets = targets.masked_fill(~counted, 0)
    _check_vocabulary(targets, logits.shape[-1])
    nll = _RowwiseNLL.apply(logits.flatten(0, 1), targets.flatten(), counted.flatten())
    return nll.view(labels.shape), counted


class _RowwiseNLL(torch.autograd.Function):
    """Cross entropy of rows ``[N, V]`` in blocks; rows that do not count are never looked at by the result."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets, counted)
        nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        for rows in _row_blocks(logits):
            nll[rows] = F.cross_entropy(_wide(logits[rows]), targets[rows], reduction="none").float()
        return nll.masked_fill_(~counted, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, counted = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            # d nll / d logits = softmax - onehot(target), times the incoming gradient of the row.
            block = torch.softmax(_wide(logits[rows]), dim=-1)
            block.scatter_add_(1, targets[rows, None], block.new_full((block.shape[0], 1), -1.0))
            block *= grad[rows, None].to(block.dtype)
            grad_logits[rows] = block.masked_fill_(~counted[rows, None], 0.0).to(logits.dtype)
        return grad_logits, None, None


def _wide(block: Tensor) -> Tensor:
    return block.to(torch.promote_types(block.dtype, torch.float32))


def _row_blocks(logits: Tensor) -> list[slice]:
    # CPU blocks stay in the cache; on a GPU larger blocks keep the number of launches small (256 MiB of float32).
    elements = 2**26 if logits.is_cuda else 2**20
    step = max(1, elements // max(1, logits.shape[1]))
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def _check_shapes(logits: Tensor, labels: Tensor, next_token: Tensor | None, document_ids: Tensor | None) -> None:
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be [B, T, V] and labels [B, T], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if next_token is not None and next_token.shape != labels.shape[:1]:
        raise ValueError(f"next_token must be [B] = [{labels.shape[0]}], got {tuple(next_token.shape)}")
    if document_ids is not None and document_ids.shape != labels.shape:
        raise ValueError(f"document_ids must be [B, T] = {tuple(labels.shape)}, got {tuple(document_ids.shape)}")


def _check_vocabulary(targets: Tensor, vocab_size: int) -> None:
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(x) for x in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets must lie in [0, {vocab_size}) or be {IGNORE_INDEX}, got values from {low} to {high}; "
            "the tokens and the model must share one vocabulary"
        )
