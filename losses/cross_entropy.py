"""Next-token negative log-likelihood per position, with the sum left to the caller.

B batch, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import logit_nll

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
    _check_vocabulary(targets.masked_fill(~counted, 0), logits.shape[-1])
    targets = targets.masked_fill(~counted, IGNORE_INDEX)
    nll = logit_nll(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    return nll.float().view(labels.shape), counted


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
    # On a GPU this check would wait for the device.
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(x) for x in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets must lie in [0, {vocab_size}) or be {IGNORE_INDEX}, got values from {low} to {high}; "
            "the tokens and the model must share one vocabulary"
        )
