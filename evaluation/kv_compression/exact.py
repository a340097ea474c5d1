"""Perplexity of a model that reads a shortened past: every original token of a block once, whatever the method.

Notable: targets do not depend on method or ratio, budgets are reported as they were achieved, and targets inside spans,
which still see their span in full, are told apart from those that depend on slots.

Legend: B batch, N blocks, T original tokens of a block, S columns of a row with sentinels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evaluation.scoring import perplexity_of
from losses.output_head import evaluation_mode
from patches.compressed_rows import Compression, Method, forward_under, label_nll, plain_rows
from patches.rules import dense_mask, scattered_keep
from patches.rules_dense import Rule
from patches.rules_form import text_config, unwrapped
from patches.rules_kinds import PLAIN, SLOT
from patches.sentinel.layout import IGNORED, SpanLayout
from patches.sentinel.layout_parts import Span
from patches.sentinel.sampler import SpanSampler
from patches.sentinel.sentinels import Sentinels

Sampler = Callable[..., Sequence[Span]]
GROUPS = ("", "_in_span", "_after_span")


@dataclass(frozen=True)
class Rows:
    """What turns blocks into rows: the method and where its random parts come from."""

    compression: Compression
    sentinels: Sentinels | None
    sampler: Sampler
    spans: Sequence[Sequence[Span]] | None
    seed: int

    def __post_init__(self) -> None:
        if self.compression.method == "sentinel" and self.sentinels is None:
            raise ValueError("method='sentinel' needs sentinels: pass what add_sentinels returned")

    def batch(self, ids: Tensor, first: int) -> tuple[SpanLayout, Tensor | None]:
        """Return the layout of blocks ``[B, T]``, numbered from ``first`` on, and what scattered keeps."""
        draws = [random.Random(f"{self.seed} {first + row}") for row in range(len(ids))]
        compression = self.compression
        if compression.method == "sentinel":
            assert self.sentinels is not None
            slots, size = self.sentinels.slots, ids.shape[1]
            if self.spans is not None:
                return SpanLayout.from_spans(ids, self.spans[first : first + len(ids)], self.sentinels), None
            chosen = [self.sampler(size, slots=slots, generator=draw) for draw in draws]
            forget = self.sampler.forget(size, slots) if isinstance(self.sampler, SpanSampler) else None
            return SpanLayout.from_spans(ids, chosen, self.sentinels, forget=forget), None
        if compression.method == "scattered":
            ratio = compression.compression_ratio
            keep = [scattered_keep(1, ids.shape[1], ratio, generator=draw) for draw in draws]
            return plain_rows(ids), torch.cat(keep)
        return plain_rows(ids), None


@dataclass(frozen=True)
class Scoring:
    """What is asked of rows, and how it is summed up.

    Attributes:
        batch_size: blocks of a forward.
        weighting: of the mean, ``token`` or ``batch``.
        exclude: sentinels that are taken out of every predicted distribution.
        published_labels: targets as published, see `SpanLayout.published_labels`.

    Raises:
        ValueError: options out of range, or that contradict each other.
    """

    batch_size: int
    weighting: Literal["token", "batch"]
    exclude: Sentinels | None
    published_labels: bool

    def __post_init__(self) -> None:
        if self.published_labels and self.exclude is not None:
            raise ValueError("published_labels may ask for a sentinel: pass exclude_sentinel_logits=False")
        if self.batch_size < 1 or self.weighting not in ("token", "batch"):
            raise ValueError(
                f"perplexity needs batch_size >= 1 and weighting token or batch, got {self.batch_size} and "
                f"{self.weighting!r}"
            )

    @torch.no_grad()
    def batches(self, model: nn.Module, blocks: Tensor | Sequence[Tensor], rows: Rows) -> Iterator[dict[str, Any]]:
        """Yield the sums of each batch."""
        device = next(model.parameters()).device
        for first in range(0, len(blocks), self.batch_size):
            stop = min(first + self.batch_size, len(blocks))
            ids = torch.stack([torch.as_tensor(blocks[index]) for index in range(first, stop)])
            layout, keep = rows.batch(ids, first)
            layout, keep = layout.to(device), None if keep is None else keep.to(device)
            rule = rows.compression.rule(layout, keep=keep)
            with evaluation_mode(model):
                logits = forward_under(model, layout, rule)
            labels = layout.published_labels if self.published_labels else layout.labels
            nll = label_nll(logits, labels, exclude=self.exclude)
            yield _sums(nll, labels, layout) | {
                "achieved": float(_achieved(rows.compression, layout, keep).sum()),
                "visible": float(_visible(rule, layout).sum()),
            }

    def report(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return sums and perplexities of all batches, and of the groups of targets."""
        found: dict[str, Any] = {}
        for name in GROUPS:
            nll_sum, count = math.fsum(part[name][0] for part in parts), sum(part[name][1] for part in parts)
            found |= {f"nll_sum{name}": nll_sum, f"num_targets{name}": count}
            found[f"perplexity{name}"] = perplexity_of(nll_sum / count) if count else None
        if self.weighting == "batch":
            means = [part[""][0] / part[""][1] for part in parts]
            found["perplexity"] = perplexity_of(math.fsum(means) / len(means))
        return found


def perplexity(
    model: nn.Module,
    blocks: Tensor | Sequence[Tensor],
    *,
    method: Method = "sentinel",
    compression_ratio: float = 0.5,
    sentinels: Sentinels | None = None,
    sampler: Sampler | None = None,
    spans: Sequence[Sequence[Span]] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    num_sinks: int = 4,
    weighting: Literal["token", "batch"] = "token",
    exclude_sentinel_logits: bool = True,
    published_labels: bool = False,
) -> dict[str, Any]:
    """Score blocks of original tokens under a compression method.

    Args:
        model: causal LM, PEFT-wrapped or not.
        blocks: ``[N, T]`` int64.
        method: see `patches.compressed_rows.Compression`.
        compression_ratio: fraction of entries removed.
        sentinels: their ids; also left out of the predictions of baselines.
        sampler: chooses the spans of a block; None is ``SpanSampler(compression_ratio)``.
        spans: the spans of every block instead of a sampler.
        seed: block i draws from (seed, i).
        batch_size: blocks of a forward; the result does not depend on it, unless weighted by batch.
        num_sinks: first tokens that ``streaming`` keeps.
        weighting: ``token``: exp of the mean over all targets; ``batch``: exp of the mean of batch means, as published.
        exclude_sentinel_logits: take the sentinels out of every predicted distribution.
        published_labels: targets as published, see `SpanLayout.published_labels`.

    Returns:
        ``nll_sum``, ``num_targets``, ``perplexity``, the same ``_in_span`` (targets predicted from a token of a closed
        span) and ``_after_span`` (predicted from a token that sees a slot), ``achieved_ratio`` and
        ``visible_fraction`` (means over blocks), ``cache_bytes_per_token`` (of what is kept of a block, per original
        token), ``method``, ``compression_ratio``. The perplexity of no targets is None.

    Raises:
        ValueError: options that contradict each other.
    """
    if not len(blocks):
        raise ValueError("perplexity needs at least one block, got none")
    scoring = Scoring(batch_size, weighting, sentinels if exclude_sentinel_logits else None, published_labels)
    compression = compression_of(method, compression_ratio, len(blocks[0]), num_sinks=num_sinks)
    rows = Rows(compression, sentinels, sampler or SpanSampler(compression_ratio), spans, seed)
    parts = list(scoring.batches(model, blocks, rows))
    achieved, visible = (sum(part[name] for part in parts) / len(blocks) for name in ("achieved", "visible"))
    asked = {"method": method, "compression_ratio": compression_ratio}
    budget = {"achieved_ratio": achieved, "visible_fraction": visible}
    budget["cache_bytes_per_token"] = (1 - achieved) * entry_bytes(model)
    return asked | scoring.report(parts) | budget


def compression_of(method: Method, compression_ratio: float, num_tokens: int, *, num_sinks: int = 4) -> Compression:
    """Return a method at a ratio; the window of ``streaming`` is such that a query after the block sees what is left.

    Raises:
        ValueError: the ratio leaves no window beside the sinks, or `Compression` refuses the options.
    """
    if method != "streaming":
        return Compression(method, compression_ratio, num_sinks)
    window = int((1 - compression_ratio) * num_tokens + 0.5) - num_sinks + 1
    if window < 1:
        raise ValueError(
            f"ratio {compression_ratio} of {num_tokens} tokens leaves no window beside {num_sinks} sinks: "
            "lower num_sinks"
        )
    return Compression(method, compression_ratio, num_sinks, window)


def entry_bytes(model: nn.Module) -> int:
    """Return the bytes of keys and values of one token in all layers."""
    config = text_config(model)
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int(2 * config.num_hidden_layers * num_kv_heads * head_dim * unwrapped(model).dtype.itemsize)


def _sums(nll: Tensor, labels: Tensor, layout: SpanLayout) -> dict[str, Any]:
    """Sum in float64 over all targets, those predicted inside spans, and those predicted from a view of slots."""
    counted = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    sees_slot = (layout.kind == SLOT).cumsum(1) > 0
    groups = (counted, counted & (layout.span > 0), counted & sees_slot)
    return {
        name: (float(nll.double()[group].sum()), int(group.sum())) for name, group in zip(GROUPS, groups, strict=True)
    }


def _achieved(compression: Compression, layout: SpanLayout, keep: Tensor | None) -> Tensor:
    """Return ``[B]``: 1 - entries that a query placed right after a block sees / T."""
    if compression.method == "sentinel":
        return layout.achieved_ratio
    batch_size, size = layout.kind.shape
    places = torch.arange(max(batch_size, size + 1), device=layout.kind.device)
    seen = compression.token_rule(keep)(places[:batch_size, None], places[:1], places[size], places[:size])
    return 1 - seen.expand(batch_size, size).sum(1).double() / size


def _visible(rule: Rule, layout: SpanLayout) -> Tensor:
    """Return ``[B]``: keys that plain queries see, themselves included / T (T + 1) / 2."""
    batch_size, size = layout.kind.shape
    seen = dense_mask(rule, batch_size, size, layout.kind.device)[:, 0].sum(2)
    num_tokens = layout.num_tokens.double()
    return (seen * (layout.kind == PLAIN)).sum(1) / (num_tokens * (num_tokens + 1) / 2)
