"""Where text tokens, landmarks and chunks of a batch lie among the positions the blocks compute.

Callers know text tokens only. A layout inserts the landmarks, finds chunks and query groups again among the positions,
and takes the text back out. ``GridLayout`` serves rows of one document each that start at their first token: positions
form a grid of chunks, and everything is a reshape. ``IndexedLayout`` serves packed documents and the continuation of a
cache through index maps (built in ``layout_maps``).

Legend: B batch, T text tokens, P positions, S text tokens of a chunk, C = S + 1 positions of a chunk, R complete chunks
of a call, G query groups (positions that share a retrieval), H heads, D head size, K retrieved chunks, M model width.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.rows import align, restore, take


class Layout(Protocol):
    """What the body of the model asks of a layout."""

    num_chunks: int
    """R, complete chunks per row (an upper bound where rows differ)."""
    visible: Tensor | Literal["causal"]
    """Chunks each complete chunk may retrieve, as ``retrieve_chunks`` takes it."""
    document_ids: Tensor | None
    """Documents of the positions ``[B, P]`` for the window attention."""
    retrieves: bool
    """Whether any position of this call may use a retrieval made in this call."""
    row_chunks: list[int] | None
    """Complete chunks of each row; None = ``num_chunks`` in every row, or not known."""
    first_chunk: int | None
    """Number in the sequence of the first chunk of a part of it; None = the call has no part."""

    def insert(self, text: Tensor, landmark: Tensor) -> Tensor:
        """Place text embeddings ``[B, T, M]`` and landmarks ``[M]`` at their positions ``[B, P, M]``."""
        ...

    def text(self, x: Tensor) -> Tensor:
        """Return the text positions ``[B, T, M]`` of ``[B, P, M]``."""
        ...

    def landmarks(self, x: Tensor) -> Tensor:
        """Return the landmark positions ``[B, R, M]`` of the complete chunks."""
        ...

    def chunks(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """Return the complete chunks ``[B, R, C, M]``; ``pending`` holds tokens of earlier calls."""
        ...

    def split(self, x: Tensor) -> Tensor:
        """Arrange positions ``[B, P, H, D]`` by query group ``[B, G, rows, H, D]``."""
        ...

    def join(self, x: Tensor) -> Tensor:
        """Turn ``[B, G, rows, H, D]`` back to ``[B, P, H, D]``; positions without a group get 0."""
        ...

    def assign(self, rows: Tensor, empty: float) -> Tensor:
        """Turn a value per complete chunk ``[B, R, K]`` into one per query group ``[B, G, K]``."""
        ...


class GridLayout:
    """One document per row, its first token in the first cell; holes only behind the last token of a row."""

    visible: Tensor | Literal["causal"] = "causal"
    document_ids: Tensor | None = None
    row_chunks: list[int] | None = None
    first_chunk: int | None = None

    def __init__(self, length: int, chunk_size: int, *, offsets: Tensor | None = None) -> None:
        """Lay out rows of ``length`` tokens; ``offsets`` [B] are their first valid columns (None = all 0)."""
        self.length = length
        self.chunk_size = chunk_size
        self.num_chunks = length // chunk_size
        self.num_groups = -(-length // chunk_size)
        # Chunks 0 and 1 of a document retrieve nothing.
        self.retrieves = self.num_groups > 2
        self.offsets = offsets

    @property
    def num_positions(self) -> int:
        """P."""
        return self.num_groups * (self.chunk_size + 1)

    def insert(self, text: Tensor, landmark: Tensor) -> Tensor:
        """Reshape text ``[B, T, M]`` to chunks and append a landmark ``[M]`` to each: ``[B, P, M]``."""
        text = align(text, self.offsets)
        holes = self.num_groups * self.chunk_size - self.length
        text = F.pad(text, (0, 0, 0, holes)) if holes else text
        text = text.unflatten(1, (self.num_groups, self.chunk_size))
        rows = landmark.to(text.dtype).expand(text.shape[0], self.num_groups, 1, -1)
        return torch.cat([text, rows], dim=2).flatten(1, 2)

    def text(self, x: Tensor) -> Tensor:
        """Drop the landmark column of ``[B, P, M]``: ``[B, T, M]``."""
        text = self.split(x)[:, :, : self.chunk_size].flatten(1, 2)[:, : self.length]
        return restore(text, self.offsets)

    def landmarks(self, x: Tensor) -> Tensor:
        """Return the last column of the complete chunks ``[B, R, M]``."""
        return self.split(x)[:, : self.num_chunks, self.chunk_size]

    def chunks(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """Return the complete rows of the grid ``[B, R, C, M]``."""
        return self.split(x)[:, : self.num_chunks]

    def split(self, x: Tensor) -> Tensor:
        """View positions ``[B, P, ...]`` as the grid of chunks ``[B, G, C, ...]``."""
        return x.unflatten(1, (self.num_groups, self.chunk_size + 1))

    def join(self, x: Tensor) -> Tensor:
        """View the grid ``[B, G, C, ...]`` as positions ``[B, P, ...]``."""
        return x.flatten(1, 2)

    def assign(self, rows: Tensor, empty: float) -> Tensor:
        """Shift ``[B, R, K]`` by one chunk to ``[B, G, K]``: the landmark of a chunk serves the next one."""
        return F.pad(rows[:, : self.num_groups - 1], (0, 0, 1, 0), value=empty)


@dataclass
class IndexedLayout:
    """Index maps of a call; all are int64 and legal everywhere, entries of absent cells are arbitrary."""

    num_chunks: int
    visible: Tensor
    document_ids: Tensor | None
    retrieves: bool
    insert_map: Tensor
    """Text column of each position ``[B, P]``."""
    is_landmark: Tensor
    """Whether a position is a landmark (or nothing) ``[B, P]``."""
    text_map: Tensor
    """Position of each text column ``[B, T]``."""
    chunk_map: Tensor
    """Positions of each complete chunk ``[B, R, C]``, counted behind the pending cells if there are any."""
    group_map: Tensor
    """Positions of each query group ``[B, G, rows]``."""
    join_map: Tensor
    """Flat cell ``G * rows`` of each position ``[B, P]``."""
    has_group: Tensor | None
    """Whether a position belongs to a query group ``[B, P]``; None = all do."""
    num_pending: int = 0
    """Cells in front of the positions in ``chunk_map``."""
    row_chunks: list[int] | None = None
    """Complete chunks of each row."""
    first_chunk: int | None = None

    @property
    def num_positions(self) -> int:
        """P."""
        return self.insert_map.shape[1]

    @property
    def num_groups(self) -> int:
        """G."""
        return self.group_map.shape[1]

    def insert(self, text: Tensor, landmark: Tensor) -> Tensor:
        """Gather text ``[B, T, M]`` to ``[B, P, M]``, put the landmark ``[M]`` everywhere else."""
        return torch.where(self.is_landmark[..., None], landmark.to(text.dtype), take(text, self.insert_map))

    def text(self, x: Tensor) -> Tensor:
        """Gather the text positions of ``[B, P, M]``: ``[B, T, M]``."""
        return take(x, self.text_map)

    def landmarks(self, x: Tensor) -> Tensor:
        """Gather the last position of each complete chunk ``[B, R, M]``."""
        return take(x, (self.chunk_map[..., -1] - self.num_pending).clamp_min(0))

    def chunks(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """Gather the complete chunks ``[B, R, C, M]``, pending tokens in front."""
        return take(x if pending is None else torch.cat([pending, x], dim=1), self.chunk_map)

    def split(self, x: Tensor) -> Tensor:
        """Gather positions ``[B, P, ...]`` by query group ``[B, G, rows, ...]``."""
        return take(x, self.group_map)

    def join(self, x: Tensor) -> Tensor:
        """Gather query groups ``[B, G, rows, ...]`` by position ``[B, P, ...]``."""
        joined = take(x.flatten(1, 2), self.join_map)
        return joined if self.has_group is None else joined * self.has_group[..., None, None]

    def assign(self, rows: Tensor, empty: float) -> Tensor:
        """Return ``[B, R, K]`` as it is: group r is what follows complete chunk r."""
        return rows
