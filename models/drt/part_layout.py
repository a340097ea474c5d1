"""The grid of chunks of one part of a sequence whose other parts lie in other processes.

Legend: B batch, S text tokens of a chunk, R complete chunks of the part, E chunks up to the end of the part, G query
groups of the part, K retrieved chunks.
"""

import torch
from torch import Tensor

from kernels.context_parallel import SequencePart
from models.drt.layout import GridLayout
from models.drt.retrieval import ChunkMemory
from models.part_window import PartWindow


class PartLayout(GridLayout):
    """A grid that begins with chunk number ``first_chunk`` of the sequence.

    Args:
        part: Tokens of this process, cut between chunks.
        chunk_size: S.
        window_size: Of the self attention.
    """

    def __init__(self, part: SequencePart, chunk_size: int, window_size: int) -> None:
        super().__init__(part.stop - part.start, chunk_size)
        self.part = part
        self.first_chunk = part.start // chunk_size
        self.retrieves = part.length > 2 * chunk_size
        self.window = PartWindow(part, window_size)

    def remember(self, memory: ChunkMemory) -> ChunkMemory:
        """Put the chunks of all earlier parts in front of those of this one: ``[B, R, ...]`` to ``[B, E, ...]``."""
        counts = self.part.units(self.chunk_size)
        return ChunkMemory(*(self.part.up_to_here(x, counts) for x in memory))

    def assign(self, rows: Tensor, empty: float) -> Tensor:
        """Shift ``[B, R, K]`` by one chunk to ``[B, G, K]``; the first group is served by the part before."""
        before = self.part.before(rows, 1)
        if not before.shape[1]:
            before = torch.cat([before, rows.new_full((rows.shape[0], 1, rows.shape[2]), empty)], dim=1)
        return torch.cat([before, rows[:, : self.num_groups - 1]], dim=1)
