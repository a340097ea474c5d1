"""How many targets a batch has, without looking at it on the host.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

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
