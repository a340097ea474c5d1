"""How a causal LM reads rows in training under a compression method: rows and labels of a batch, and their logits.

Letters: B batch, S columns of a row with sentinels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from patches.compressed_rows import Compression, forward_under, labels_inside_documents, plain_rows
from patches.sentinel import SpanLayout, recurrent_forward
from patches.sentinel.sentinels import Sentinels


@dataclass(frozen=True)
class CompressedReading:
    """A method, and in which passes and towards which targets it is trained.

    Attributes:
        compression: the method.
        mixture: what micro-batches that hold a ``ratio_index`` use instead.
        sentinels: their ids; a baseline needs none.
        training_mode: ``masked``: one pass under a mask; ``recurrent``: chunks over a cache that evicts.
        chunk_size: columns of a chunk in recurrent mode.
        exclude_sentinel_logits: take the sentinels out of every predicted distribution.
        published_labels: targets as published, which may be sentinels.

    Raises:
        ValueError: options that contradict each other.
    """

    compression: Compression
    mixture: tuple[Compression, ...]
    sentinels: Sentinels | None
    training_mode: Literal["masked", "recurrent"]
    chunk_size: int
    exclude_sentinel_logits: bool
    published_labels: bool

    def __post_init__(self) -> None:
        sentinel = self.compression.method == "sentinel"
        if sentinel and self.sentinels is None:
            raise ValueError("method='sentinel' needs sentinels: pass what add_sentinels returned")
        if self.training_mode not in ("masked", "recurrent"):
            raise ValueError(f"training_mode is one of masked, recurrent, got {self.training_mode!r}")
        if self.training_mode == "recurrent" and not sentinel:
            raise ValueError("training_mode='recurrent' is for method='sentinel': baselines train masked")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if self.published_labels and (not sentinel or self.exclude_sentinel_logits):
            raise ValueError(
                "published_labels may ask for a sentinel: they need method='sentinel' and exclude_sentinel_logits=False"
            )

    @property
    def exclude(self) -> Sentinels | None:
        """The sentinels that are taken out of every predicted distribution; None: all remain in it."""
        return self.sentinels if self.exclude_sentinel_logits else None

    def rows(self, batch: Mapping[str, Tensor]) -> tuple[SpanLayout, Tensor]:
        """Return the layout of a batch and its labels int64 [B, S]; entries as in `KVCompressionLM.loss`."""
        if self.compression.method != "sentinel":
            layout = plain_rows(batch["input_ids"], batch.get("attention_mask"))
        elif "kind" in batch and "span" in batch:
            layout = SpanLayout(batch["input_ids"], batch["kind"], batch["span"], batch.get("forget"))
        else:
            raise ValueError("method='sentinel' needs kind and span in the batch: use datamodules.sentinel")
        if self.published_labels:
            return layout, layout.published_labels
        documents = batch.get("document_ids")
        return layout, layout.labels if documents is None else labels_inside_documents(layout, documents)

    def logits(self, model: nn.Module, layout: SpanLayout, batch: Mapping[str, Tensor], *, in_chunks: bool) -> Tensor:
        """Raw logits [B, S, V] of a model under the method's rule.

        Args:
            model: the causal LM.
            layout: what `rows` returned.
            batch: ``keep`` bool [B, S], ``document_ids`` int64 [B, S] and ``ratio_index``, as far as they are there.
            in_chunks: take the chunks of ``training_mode="recurrent"``; else it is one pass in any mode.
        """
        documents = batch.get("document_ids")
        if self.training_mode == "recurrent" and in_chunks:
            if documents is not None:
                raise ValueError("training_mode='recurrent' keeps no documents apart: leave document_ids out")
            return recurrent_forward(model, layout, chunk_size=self.chunk_size)[0]
        compression = self.mixture[int(batch["ratio_index"])] if "ratio_index" in batch else self.compression
        rule = compression.rule(layout, keep=batch.get("keep"), document_ids=documents)
        return forward_under(model, layout, rule)
