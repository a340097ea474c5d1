"""The training loss of the models: next-token cross entropy in float32.

Legend: B batch, T tokens, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

from kernels.cross_entropy import logit_nll

IGNORED = -100


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
    total = logit_nll(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED).sum()
    count = (targets != IGNORED).sum().clamp_min(1) if num_items is None else num_items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
