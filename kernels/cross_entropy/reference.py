"""Cross entropy of rows of logits, written plainly.

Legend: N rows, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def logit_nll_reference(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Compute ``-log softmax(logits)[target]`` of ``[N, V]``, ``[N]``: float32 (float64 for float64) ``[N]``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="none", ignore_index=ignore_index)
