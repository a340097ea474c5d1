"""Two equal ways through a model: one pass under a mask, and chunks over a cache that forgets what is dead.

Legend: B batch, S columns of a row, T columns of a chunk, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from patches.rules import as_attention_mask, sentinel
from patches.rules_kinds import PAD, PLAIN
from patches.sentinel.cache import HOLE, EvictingCache
from patches.sentinel.feeding import Columns, feed
from patches.sentinel.layout import SpanLayout


def masked_forward(model: nn.Module, layout: SpanLayout) -> Tensor:
    """Run rows with sentinels through a model in one pass under the mask of the rule.

    Args:
        model: Decoder, PEFT-wrapped or not.
        layout: Rows ``[B, S]``, on the model's device.

    Returns:
        Raw logits ``[B, S, V]``, sentinel columns included.
    """
    columns = torch.arange(layout.kind.shape[1], device=layout.kind.device).expand_as(layout.kind)
    # Always a mask and positions: without a mask, repeated positions would be taken for packed sequences.
    positions = layout.position_ids
    mask = as_attention_mask(model, sentinel(layout), query_index=columns, query_position_ids=positions)
    return model(input_ids=layout.input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def recurrent_forward(
    model: nn.Module, layout: SpanLayout, *, chunk_size: int = 256, cache: EvictingCache | None = None
) -> tuple[Tensor, EvictingCache]:
    """Run rows with sentinels through a model in chunks, evicting what no later query can see.

    Equal to `masked_forward` in logits and gradients; a chunk of one column is token-by-token decoding. The cache holds
    at most the live entries, one chunk, and the tokens of spans that are still open.

    Args:
        model: Decoder, PEFT-wrapped or not.
        layout: Rows ``[B, S]``, on the model's device.
        chunk_size: Columns of a call.
        cache: What went before, its spans all closed; None = nothing. Changed in place.

    Returns:
        Raw logits ``[B, S, V]`` and the cache.
    """
    cache = EvictingCache() if cache is None else cache
    return torch.cat(list(stream(model, layout, chunk_size, cache)), dim=1), cache


def stream(model: nn.Module, layout: SpanLayout, chunk_size: int, cache: EvictingCache) -> Iterator[Tensor]:
    """Feed a layout in chunks and evict after each; yields the logits ``[B, T, V]`` of each chunk."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    first, columns = cache.num_seen, continued(layout, cache)
    cache.forget = layout.forget
    for start in range(0, layout.kind.shape[1], chunk_size):
        chunk = columns.part(start, start + chunk_size)
        logits = feed(model, cache, chunk)
        needed = layout.needed(start + chunk.kind.shape[1] - 1)
        earlier = cache.index < first
        keep = torch.where(earlier, cache.index != HOLE, needed.gather(1, (cache.index - first).clamp(min=0)))
        if bool((~keep & ~earlier).any() | (chunk.kind == PAD).any()):
            cache.evict(keep)
        yield logits
    cache.forget = None


def continued(layout: SpanLayout, cache: EvictingCache) -> Columns:
    """Return the columns of a layout; positions and span numbers continue those of a cache."""
    position_ids, span = layout.position_ids, layout.span.long()
    if cache.num_physical:
        if layout.forget is not None:
            raise ValueError("rows that forget spans start on an empty cache: pass cache=None, or forget=None")
        past = cache.position_ids.amax(1, keepdim=True) + 1
        # A sentinel before the first token copies the last position of the past.
        leading = (layout.kind == PLAIN).cumsum(1) == 0
        position_ids = (position_ids + past - leading.long()).clamp(min=0)
        span = torch.where(span > 0, span + cache.span.amax(1, keepdim=True).clamp(min=0), 0)
    return Columns(layout.input_ids, layout.kind.long(), span, position_ids)
