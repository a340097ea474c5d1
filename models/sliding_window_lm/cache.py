"""The cache of a sliding-window language model: the last window of keys and values, and nothing else.

Legend: B batch, T tokens.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from models.rows import RowProgress, Spans
from models.sliding_window_lm.configuration_sliding_window_lm import SlidingWindowLMConfig
from models.window_cache import WindowRing


class SlidingWindowCache(Cache):
    """State of a batch of sequences, of constant size."""

    def __init__(self, config: SlidingWindowLMConfig) -> None:
        super().__init__(layers=[])
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.ring = WindowRing(self.config.num_hidden_layers, self.config.window_size)
        self.progress = RowProgress()

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Spans, Tensor | None]:
        """Start a call with ids ``[B, T]`` and a mask ``[B, past + T]``.

        Returns:
            Its valid tokens and the ids of the keys it will see ``[B, L + T]`` (None = all real).
        """
        spans = self.progress.spans(input_ids.shape, attention_mask)
        length = input_ids.shape[1]
        past = self.progress.lengths or [0] * input_ids.shape[0]
        real = self.ring.begin(past, spans.lengths, width=length, device=input_ids.device)
        self.progress.advance(spans, length)
        return spans, real

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of input positions seen, padding included."""
        return self.progress.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def nbytes(self) -> int:
        """Return the bytes held."""
        return self.ring.nbytes()

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Make row i continue what row ``indices[i]`` was."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        self.progress.select(rows.tolist())
        self.ring.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(len(self.progress.lengths)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: keys that left the window are gone.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a SlidingWindowCache cannot be cropped: older positions are gone, start a new cache")
