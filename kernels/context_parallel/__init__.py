"""One sequence over several processes: its parts, and what a part needs of the parts before it.

A causal model needs only two things from other processes, and both come from earlier parts: what lies just before its
own part (a window's keys, a retrieval), and everything so far (a chunk memory). Gradients go the way back.

Legend: B batch, N entries of a part along the sequence.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from kernels.context_parallel.exchange import before, up_to_here

__all__ = ["Cut", "SequenceGroup", "SequencePart"]


@dataclass(frozen=True)
class Cut:
    """Where the sequences of a model may be cut.

    Attributes:
        unit: Tokens between which no cut may lie, a chunk; every part holds a whole one at least.
        least: Tokens that every part but the last must have, so that a window reaches no further than the part before.
    """

    unit: int = 1
    least: int = 1

    def fits(self, length: int, num_parts: int) -> bool:
        """Whether ``length`` tokens can be cut into so many parts."""
        each, more = divmod(length // self.unit, num_parts)
        before_last = each + (more == num_parts - 1)
        return each >= 1 and (num_parts == 1 or before_last * self.unit >= self.least)

    def bounds(self, length: int, num_parts: int) -> tuple[int, ...]:
        """Cut ``length`` tokens; parts differ by one unit at most, the last also takes what fills no unit.

        Returns:
            First token of every part and the end, ``num_parts + 1`` numbers.

        Raises:
            ValueError: parts would be too short.
        """
        if not self.fits(length, num_parts):
            raise ValueError(
                f"a sequence of {length} tokens cannot be split into {num_parts} parts of whole chunks ({self.unit}) "
                f"and at least {self.least} tokens: let fewer processes share it, or take a longer one"
            )
        each, more = divmod(length // self.unit, num_parts)
        return (*(self.unit * (part * each + min(part, more)) for part in range(num_parts)), length)


class SequenceGroup:
    """Processes that share every sequence, in the order of its parts.

    Attributes:
        ranks: their ranks in the run.
        rank: which of them this is, from 0.
        process_group: connects them; None: they are not there, and nothing can be exchanged.
        received_bytes: what this process has got from the others so far.
    """

    def __init__(self, ranks: list[int], rank: int, process_group: dist.ProcessGroup | None) -> None:
        self.ranks, self.rank, self.process_group = ranks, rank, process_group
        self.received_bytes = 0

    @property
    def size(self) -> int:
        """Number of parts."""
        return len(self.ranks)

    def part(self, length: int, cut: Cut) -> "SequencePart":
        """Return this process's part of a sequence of ``length`` tokens."""
        return SequencePart(cut.bounds(length, self.size), self)


@dataclass(frozen=True)
class SequencePart:
    """The part of a sequence that this process computes.

    All processes of the group must make the same calls in the same order; so must their backward passes.

    Attributes:
        bounds: First token of every part, and the end of the last.
        group: The processes with the parts.
    """

    bounds: tuple[int, ...]
    group: SequenceGroup

    @property
    def start(self) -> int:
        """First token of this part."""
        return self.bounds[self.group.rank]

    @property
    def stop(self) -> int:
        """Token after the last of this part."""
        return self.bounds[self.group.rank + 1]

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.bounds[-1]

    def units(self, unit: int) -> list[int]:
        """Return how many whole units of tokens every part has."""
        return [(stop - start) // unit for start, stop in pairwise(self.bounds)]

    def before(self, x: Tensor, count: int) -> Tensor:
        """Return the last ``count`` entries of what the process before passed, ``[B, count, ...]``; the first gets 0.

        Args:
            x: ``[B, N, ...]``, the entries of this part; N may differ between parts, and is at least ``count`` in all
                but the last.
            count: Entries, the same in all processes.

        Raises:
            ValueError: a part that must hand entries on has fewer.
        """
        return before(x, count, self.group)

    def up_to_here(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return the entries of the first part to this one, ``[B, counts[0] + ... + counts[rank], ...]``.

        The gradient of an entry is the sum over the parts that got it, formed in float32 in the order of the parts.

        Args:
            x: ``[B, counts[rank], ...]``, the entries of this part.
            counts: Entries of every part; none has more than the first.
        """
        return up_to_here(x, counts, self.group)
