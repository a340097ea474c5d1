"""The cache of a model with a frozen retriever: window, running chunk, tokens, chunk memory and neighbours.

Legend: B batch, T tokens of a call, L tokens seen, S tokens of a chunk, R chunks completed in a call, E stored chunks,
K neighbours, G kv heads, D head size, M model width.
"""

import torch
from torch import Tensor

from models.row_cache import RowCache, appended, selected
from models.row_lm import RowCall
from models.rows import take
from models.rpt.configuration_rpt import RPTConfig
from models.window_cache import WindowRing


class RPTCache(RowCache):
    """State of a batch of sequences."""

    config: RPTConfig

    def clear(self) -> None:
        """Hold nothing but an empty window."""
        self.ring = WindowRing(self.config.num_hidden_layers, self.config.window_size)
        self.pending: Tensor | None = None
        """Lower outputs of the running chunk ``[B, S, M]``."""
        self.tokens: Tensor | None = None
        """``[B, L]``."""
        self.keys: Tensor | None = None
        """``[B, E, S, G, D]``."""
        self.values: Tensor | None = None
        """``[B, E, S, G, D]``."""
        self.neighbours: Tensor | None = None
        """``[B, E, K]``."""

    def begin(self, input_ids: Tensor, call: RowCall) -> Tensor | None:
        """Start a call with ids ``[B, T]``; return the ids of the keys it will see, as ``WindowRing.begin``."""
        self.tokens = appended(self.tokens, input_ids, call.past, call.new)
        return self.ring.begin(call.past, call.new, width=input_ids.shape[1], device=input_ids.device)

    def complete_chunks(self, x: Tensor, call: RowCall) -> tuple[Tensor, list[int], list[int]]:
        """Return the chunks that lower outputs ``[B, T, M]`` complete, and keep the rest.

        Returns:
            ``[B, R, S, M]``, and for each row how many chunks it had and how many of these are its own.
        """
        size = self.config.chunk_size
        running = [past % size for past in call.past]
        joined = appended(self.pending, x, running, call.new)
        done = [past // size for past in call.past]
        counts = [(rest + new) // size for rest, new in zip(running, call.new, strict=True)]
        shift = torch.tensor(counts, device=x.device)[:, None] * size
        place = shift + torch.arange(size, device=x.device)
        self.pending = take(joined, place.clamp_max(max(0, joined.shape[1] - 1))).detach() if joined.shape[1] else None
        return joined[:, : max(counts) * size].unflatten(1, (max(counts), size)), done, counts

    def store(self, keys: Tensor, values: Tensor, done: list[int], counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Put chunk keys and values ``[B, R, S, G, D]`` behind those of each row; return all, and their tokens."""
        assert self.tokens is not None
        all_keys = appended(self.keys, keys, done, counts)
        all_values = appended(self.values, values, done, counts)
        self.keys, self.values = all_keys.detach(), all_values.detach()
        num_chunks = all_keys.shape[1]
        return (
            all_keys,
            all_values,
            self.tokens[:, : num_chunks * self.config.chunk_size].unflatten(1, (num_chunks, -1)),
        )

    def select(self, rows: Tensor) -> None:
        """Make row i hold what row ``rows[i]`` held."""
        self.ring.select(rows)
        self.pending, self.tokens = selected(self.pending, rows), selected(self.tokens, rows)
        self.keys, self.values = selected(self.keys, rows), selected(self.values, rows)
        self.neighbours = selected(self.neighbours, rows)

    def nbytes(self) -> int:
        """Return the bytes held."""
        tensors = (self.pending, self.tokens, self.keys, self.values, self.neighbours)
        return self.ring.nbytes() + sum(tensor.nbytes for tensor in tensors if tensor is not None)
