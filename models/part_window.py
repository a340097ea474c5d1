"""The window of a part of a sequence: its first positions see the last keys of the part before, in another process.

Legend: B batch, P positions of the part, W window, G kv heads, D head size.
"""

import torch
from torch import Tensor

from kernels.context_parallel import SequencePart


class PartWindow:
    """Hands the last ``window_size - 1`` keys and values of every layer on to the part behind."""

    def __init__(self, part: SequencePart, window_size: int) -> None:
        self.part = part
        self.count = window_size - 1

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the ``W - 1`` last positions of the part before in front of ``[B, P, G, D]``; nothing at the first."""
        if not self.count:
            return key, value
        before = self.part.before(torch.cat([key, value], dim=-1), self.count)
        keys, values = before.split((key.shape[-1], value.shape[-1]), dim=-1)
        return torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
