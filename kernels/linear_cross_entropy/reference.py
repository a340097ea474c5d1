"""Per-token loss of a language-model head, written densely: all logits, one log-softmax, plain autograd.

Legend: N targets, M model width, V vocabulary.
"""

import torch
from torch import Tensor


def token_nll_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
) -> Tensor:
    """Compute ``logsumexp(z) - z[target]`` with ``z = hidden weight^T + bias``, then ``z = c tanh(z / c)``.

    Args:
        hidden: ``[N, M]``.
        weight: ``[V, M]``.
        targets: ``[N]`` int64.
        bias: ``[V]`` or None.
        ignore_index: target whose rows give 0.
        softcap: c, or None.

    Returns:
        ``[N]`` in float32, or float64 for float64 inputs.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    active = (targets != ignore_index).nonzero().squeeze(1)
    logits = hidden[active].to(acc) @ weight.to(acc).t()  # [n, V]
    if bias is not None:
        logits = logits + bias.to(acc)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = -torch.log_softmax(logits, -1).gather(1, targets[active, None]).squeeze(1)
    return torch.zeros(targets.shape, dtype=acc, device=hidden.device).index_put((active,), nll)
