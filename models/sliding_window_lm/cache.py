"""The cache of a sliding-window language model: the last window of keys and values, and nothing else.

Legend: B batch, T tokens.
"""

from torch import Tensor

from models.row_cache import RowCache
from models.rows import Spans
from models.sliding_window_lm.configuration_sliding_window_lm import SlidingWindowLMConfig
from models.window_cache import WindowRing


class SlidingWindowCache(RowCache):
    """State of a batch of sequences, of constant size."""

    config: SlidingWindowLMConfig

    def clear(self) -> None:
        """Hold nothing but an empty window."""
        self.ring = WindowRing(self.config.num_hidden_layers, self.config.window_size)

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

    def nbytes(self) -> int:
        """Return the bytes held."""
        return self.ring.nbytes()

    def select(self, rows: Tensor) -> None:
        """Make row i hold what row ``rows[i]`` held."""
        self.ring.select(rows)
