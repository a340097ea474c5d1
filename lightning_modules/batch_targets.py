"""How many targets a batch has, without looking at it on the host.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from losses.cross_entropy import IGNORE_INDEX


def num_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Number of next-token targets that the models count, int64 scalar.

    Args:
        batch: ``labels`` int64 [B, T], not shifted, -100 for none; ``document_ids`` [B, T] where a target in another
            document than its predecessor does not count.
    """
    counted = batch["labels"][:, 1:] != IGNORE_INDEX
    if "document_ids" in batch:
        counted = counted & (batch["document_ids"][:, 1:] == batch["document_ids"][:, :-1])
    return counted.sum()


def labels_inside_documents(batch: Mapping[str, Tensor]) -> Tensor:
    """The labels of a batch, int64 [B, T], -100 where a document begins: no model then counts a target across it."""
    if "document_ids" not in batch:
        return batch["labels"]
    documents = batch["document_ids"]
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    return batch["labels"].masked_fill(begins, IGNORE_INDEX)
