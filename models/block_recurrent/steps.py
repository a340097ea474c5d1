"""How a call is walked through: in steps that end where a row's block ends.

Legend: B batch, T tokens, U tokens of a step, W block width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.block_recurrent.attention import Step
from models.rows import take


@dataclass(frozen=True)
class Stretch:
    """The tokens of one step: ``counts[b]`` of row b from column ``first[b]`` on, which is its token ``places[b]``."""

    first: list[int]
    counts: list[int]
    places: list[int]
    block_width: int

    @property
    def width(self) -> int:
        """U."""
        return max(self.counts)

    @property
    def uniform(self) -> bool:
        """Whether all rows take the same columns."""
        return len(set(self.first)) == 1 and len(set(self.counts)) == 1

    @property
    def begins_block(self) -> int | None:
        """The number of the block that all rows begin here, if they do."""
        same = len(set(self.places)) == 1 and self.places[0] % self.block_width == 0
        return self.places[0] // self.block_width if same else None

    def cut(self, x: Tensor) -> Tensor:
        """Return the tokens ``[B, U, ...]`` of ``[B, T, ...]``; behind the count of a row they are arbitrary."""
        if self.uniform:
            return x[:, self.first[0] : self.first[0] + self.width]
        first = torch.tensor(self.first, device=x.device)[:, None]
        return take(x, (first + torch.arange(self.width, device=x.device)).clamp_max(x.shape[1] - 1))

    def step(self, begun: Tensor, device: torch.device) -> Step:
        """Describe the step to the layers; ``begun`` [B] is the token at which each row's memory begins."""
        width = self.block_width
        places = torch.tensor(self.places, device=device)
        ends = [
            (place + count) % width == 0 and count > 0 for place, count in zip(self.places, self.counts, strict=True)
        ]
        finished = torch.tensor(ends, device=device)[:, None, None] if any(ends) else None
        tail = None
        if len(set(self.counts)) > 1:
            tail = torch.tensor(self.counts, device=device)[:, None] + torch.arange(width, device=device)
        return Step((places - begun).clamp_max(width), tail, finished)


def stretches(past: list[int], new: list[int], block_width: int) -> Iterator[Stretch]:
    """Walk rows that have seen ``past[b]`` tokens through ``new[b]`` more."""
    done = [0] * len(new)
    while True:
        places = [before + count for before, count in zip(past, done, strict=True)]
        counts = [
            min(block_width - place % block_width, total - count)
            for place, total, count in zip(places, new, done, strict=True)
        ]
        if not any(counts):
            return
        yield Stretch(list(done), counts, places, block_width)
        done = [count + more for count, more in zip(done, counts, strict=True)]


def rejoined(parts: list[Tensor], walked: list[Stretch], length: int) -> Tensor:
    """Put the steps ``[B, U, M]`` back in their columns ``[B, T, M]``; columns of no step are arbitrary."""
    joined = torch.cat(parts, dim=1)
    if joined.shape[1] == length and all(stretch.uniform for stretch in walked):
        return joined
    index = torch.zeros(joined.shape[0], length, dtype=torch.long)
    start = 0
    for stretch in walked:
        for row, (first, count) in enumerate(zip(stretch.first, stretch.counts, strict=True)):
            index[row, first : first + count] = torch.arange(start, start + count)
        start += stretch.width
    return take(joined, index.to(joined.device))
