"""Rows of tokens under each of the compared ways to shorten their past: sentinels, local, scattered, streaming, dense.

Notable: a baseline is a row without spans under another rule, so positions, labels and masks are made in one place and
all methods score the same targets.

Legend: B batch, T original (plain) tokens of a row, S columns of a row, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patches.rules import as_attention_mask, causal, documents, intersect, local, scattered, sentinel, streaming
from patches.rules_dense import Rule
from patches.rules_kinds import PAD, PLAIN
from patches.sentinel.layout import IGNORED, SpanLayout
from patches.sentinel.sentinels import Sentinels, suppress

Method = Literal["sentinel", "local", "scattered", "streaming", "dense"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class Compression:
    """How the past of a token is shortened.

    Attributes:
        method: ``sentinel``: by the layout of the row; ``local``, ``scattered``, ``streaming``: see `patches.rules`;
            ``dense``: not at all.
        compression_ratio: fraction of the past that ``local`` removes.
        num_sinks: first tokens that ``streaming`` keeps.
        window_size: keys to the left that ``streaming`` keeps, the query included.

    Raises:
        ValueError: an unknown method, a ratio outside [0, 1), or streaming without a window.
    """

    method: Method = "sentinel"
    compression_ratio: float = 0.5
    num_sinks: int = 4
    window_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, use one of {', '.join(METHODS)}")
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"compression_ratio is the fraction removed, in [0, 1), got {self.compression_ratio}")
        if self.method == "streaming":
            if self.window_size is None:
                raise ValueError("method='streaming' needs window_size, the keys that a query sees besides the sinks")
            streaming(self.num_sinks, self.window_size)
        elif self.window_size is not None:
            raise ValueError(f"window_size belongs to method='streaming', got method={self.method!r}")

    def token_rule(self, keep: Tensor | None = None) -> Rule:
        """Return the rule over indices of original tokens; not for ``sentinel``, whose rule is that of a layout.

        Args:
            keep: bool ``[B, T]``, what ``scattered`` keeps.
        """
        if (keep is None) == (self.method == "scattered"):
            raise ValueError(f"keep [B, T] belongs to method='scattered', got method={self.method!r}")
        if keep is not None:
            return scattered(keep)
        if self.method == "streaming":
            assert self.window_size is not None
            return streaming(self.num_sinks, self.window_size)
        return local(self.compression_ratio) if self.method == "local" else causal()

    def rule(self, layout: SpanLayout, *, keep: Tensor | None = None, document_ids: Tensor | None = None) -> Rule:
        """Return the rule over the columns of a row.

        Args:
            layout: ``[B, S]``; without spans for a baseline.
            keep: bool ``[B, S]``, what ``scattered`` keeps.
            document_ids: ``[B, S]``; documents do not see each other.
        """
        if self.method == "sentinel":
            rule = sentinel(layout)
        else:
            kept = None if keep is None else keep.gather(1, layout.plain_index.clamp(min=0))
            rule = _on_tokens(self.token_rule(kept), layout)
        return rule if document_ids is None else intersect(rule, documents(document_ids))


def sentinels_after(num_token_ids: int, *, slots: int = 1) -> Sentinels:
    """Return the sentinels whose ids follow those of a tokenizer of ``num_token_ids`` entries."""
    first = num_token_ids
    return Sentinels(first, tuple(range(first + 1, first + 1 + slots)))


def plain_rows(input_ids: Tensor, attention_mask: Tensor | None = None) -> SpanLayout:
    """Return rows without spans.

    Args:
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, 0 at padding on either side; None = no padding.
    """
    kind = torch.zeros_like(input_ids) + PLAIN
    if attention_mask is not None:
        kind = torch.where(attention_mask != 0, PLAIN, PAD)
    return SpanLayout(input_ids, kind, torch.zeros_like(input_ids))


def forward_under(model: nn.Module, layout: SpanLayout, rule: Rule) -> Tensor:
    """Run rows through a model in one pass under a rule; returns raw logits ``[B, S, V]``."""
    columns = torch.arange(layout.kind.shape[1], device=layout.kind.device).expand_as(layout.kind)
    # Always a mask and positions: without a mask, repeated positions would be taken for packed sequences.
    positions = layout.position_ids
    mask = as_attention_mask(model, rule, query_index=columns, query_position_ids=positions)
    return model(input_ids=layout.input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def labels_inside_documents(layout: SpanLayout, document_ids: Tensor) -> Tensor:
    """Return the labels ``[B, S]`` of a layout without those whose token begins another document."""
    rank = (layout.kind == PLAIN).cumsum(1)
    following = F.pad(layout.plain_index, (0, 1), value=-1).gather(1, rank.clamp(max=layout.plain_index.shape[1]))
    same = document_ids.gather(1, following.clamp(min=0)) == document_ids
    return layout.labels.masked_fill(F.pad(~same[:, :-1], (1, 0)), IGNORED)


def label_nll(logits: Tensor, labels: Tensor, *, exclude: Sentinels | None = None) -> Tensor:
    """Return ``-log p(labels[t + 1])`` from the logits at t, float32 ``[B, S]``; 0 where there is no label.

    Args:
        logits: ``[B, S, V]``.
        labels: ``[B, S]``, -100 = ignored.
        exclude: sentinels whose columns count as -inf.
    """
    scores = logits[:, :-1].float()
    if exclude is not None:
        scores = suppress(scores, exclude)
    targets = labels[:, 1:]
    nll = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return F.pad(nll.view_as(targets), (0, 1))


def _on_tokens(rule: Rule, layout: SpanLayout) -> Rule:
    """Return a rule over token indices as one over columns; a pad sees itself only and is seen by nobody else."""
    index = torch.where(layout.kind == PLAIN, layout.position_ids, -1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = index[batch, query], index[batch, key]
        seen = rule(batch, head, row.clamp(min=0), column.clamp(min=0)) & (row >= 0) & (column >= 0)
        return seen | (query == key)

    return visible
