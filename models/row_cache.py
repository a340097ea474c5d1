"""What the caches of the models here have in common: rows that may be padded, chosen and repeated, never cropped.

Legend: B batch, L things a row holds, U new ones.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from models.rows import RowProgress


class RowCache(Cache):
    """State of a batch of sequences, exact for pieces of any length."""

    def __init__(self, config: Any) -> None:
        super().__init__(layers=[])
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.progress = RowProgress()
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Hold nothing but what every new cache does."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Make row i hold what row ``rows[i]`` held; ``rows`` [B] lies on the CPU."""

    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes held."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of input positions seen, padding included."""
        return self.progress.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Make row i continue what row ``indices[i]`` was."""
        rows = torch.as_tensor(indices, dtype=torch.long).cpu()
        self.progress.select(rows.tolist())
        self.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(len(self.progress.lengths)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: what a row once was cannot be told from what it is.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"a {type(self).__name__} cannot be cropped: earlier states are gone, start a new cache")


def appended(held: Tensor | None, new: Tensor, before: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return ``[B, max of before + counts, ...]``: the first ``counts[b]`` of ``new`` behind ``before[b]`` of ``held``.

    Args:
        held: ``[B, L, ...]``, or None before the first call.
        new: ``[B, U, ...]``.
        before: how many of ``held`` each row has; what is behind them is arbitrary.
        counts: how many of ``new`` each row gets.
    """
    if held is None:
        held = new[:, :0]
    if len(set(before)) == 1 and len(set(counts)) == 1:
        return torch.cat([held[:, : before[0]], new[:, : counts[0]]], dim=1)
    length = max(count + more for count, more in zip(before, counts, strict=True))
    joined = torch.cat([held, new], dim=1)
    place = torch.arange(length, device=new.device)
    first = torch.tensor(list(before), device=new.device)[:, None]
    # Beyond a row's own end anything legal will do.
    index = torch.where(place < first, place, place - first + held.shape[1]).clamp_max(joined.shape[1] - 1)
    return joined[torch.arange(new.shape[0], device=new.device)[:, None], index]


def selected(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return ``tensor[rows]`` on its own device; None stays None."""
    return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))
