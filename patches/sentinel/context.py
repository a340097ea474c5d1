"""Compressed contexts: read a context once, keep what its slots carry, answer many questions.

Legend: B batch, T original tokens, S columns after insertion, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.sentinel.cache import EvictingCache, read_tensors, write_tensors
from patches.sentinel.feeding import Columns, feed
from patches.sentinel.forward import continued, stream
from patches.sentinel.layout import SpanLayout
from patches.sentinel.layout_parts import Span
from patches.sentinel.sampler import SpanSampler
from patches.sentinel.sentinels import Sentinels, suppress
from patches.weights_identity import weights_digest

Sampler = Callable[..., Sequence[Span]]


@dataclass(eq=False)
class CompressedContext:
    """What a model keeps of the rows it has read: a cache whose closed spans are down to their slots."""

    cache: EvictingCache
    sentinels: Sentinels | None
    """None for a context that was shortened otherwise, see `patches.sentinel.rule_generation`."""
    next_position: Tensor
    """``[B]`` int64: position of the next token."""
    next_logits: Tensor
    """``[B, V]``: prediction of the last token read, sentinel columns at -inf."""
    weights: str = ""
    """`patches.weights_identity.weights_digest` of the model that read it; empty if unknown."""

    @property
    def num_tokens(self) -> Tensor:
        """``[B]`` int64: original tokens read."""
        return self.next_position

    @property
    def num_kept(self) -> Tensor:
        """``[B]`` int64: entries that are left of them."""
        return self.cache.num_kept

    @property
    def compression_ratio(self) -> Tensor:
        """``[B]`` float64: fraction of entries removed, net of kept slots."""
        return 1 - self.num_kept.double() / self.num_tokens

    @torch.no_grad()
    def extend(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """Read more plain tokens, in place.

        Args:
            model: The model of the context.
            input_ids: ``[B, T]``.

        Returns:
            Raw logits ``[B, T, V]``.
        """
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        columns = Columns.plain(input_ids, self.next_position[:, None] + places)
        logits = feed(model, self.cache, columns)
        self.next_position = self.next_position + input_ids.shape[1]
        self.next_logits = suppress(logits[:, -1], self.sentinels)
        return logits

    def fork(self) -> "CompressedContext":
        """Return an independent copy."""
        return CompressedContext(
            self.cache.fork(), self.sentinels, self.next_position.clone(), self.next_logits.clone(), self.weights
        )

    def repeat(self, repeats: int) -> None:
        """Repeat each row, in place."""
        self.cache.batch_repeat_interleave(repeats)
        self.next_position = self.next_position.repeat_interleave(repeats)
        self.next_logits = self.next_logits.repeat_interleave(repeats, 0)

    def generate(self, model: Any, input_ids: Tensor, **generate_options: Any) -> Any:
        """Answer a question ``[B, T]`` by ``model.generate``; the context itself stays as it is.

        For a budget while answering, hand ``SentinelGenerator(..., context=self)`` to ``model.generate``.
        """
        from patches.sentinel.generation import SentinelGenerator  # it builds contexts itself

        if self.sentinels is None:
            raise ValueError("this context has no sentinels: continue it with the generator that made it")
        generator = SentinelGenerator(self.sentinels, context=self)
        return model.generate(input_ids, custom_generate=generator, **generate_options)

    def save(self, path: str | Path) -> None:
        """Write the context to one safetensors file."""
        tensors = self.cache.state() | {"next_position": self.next_position, "next_logits": self.next_logits}
        if self.sentinels is None:
            raise ValueError("only a context with sentinels is saved; save its cache instead")
        ids = " ".join(map(str, self.sentinels.ids))
        plain = {"num_seen": str(self.cache.num_seen), "sentinels": ids, "weights": self.weights}
        write_tensors(path, tensors, plain)

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", *, model: nn.Module | None = None
    ) -> "CompressedContext":
        """Read a context that `save` wrote, bit for bit.

        Args:
            path: The file.
            device: Where its tensors go.
            model: The model that will continue it; another one than it was read by is refused.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no context, or that of another model.
        """
        tensors, metadata = read_tensors(path, device)
        if not {"sentinels", "num_seen"} <= metadata.keys():
            raise ValueError(f"{path} holds no context: compress the text again")
        open_id, *slot_ids = map(int, metadata["sentinels"].split())
        weights = metadata.get("weights", "")
        if model is not None and weights and weights != weights_digest(model, (open_id, *slot_ids)):
            raise ValueError(f"the context at {path} was read by a model with other weights: compress the text again")
        cache = EvictingCache.from_state(tensors, int(metadata["num_seen"]))
        sentinels = Sentinels(open_id, tuple(slot_ids))
        return cls(cache, sentinels, tensors["next_position"], tensors["next_logits"], weights)


@torch.no_grad()
def compress(
    model: nn.Module,
    input_ids: Tensor,
    sentinels: Sentinels,
    *,
    sampler: Sampler | None = None,
    spans: Sequence[Sequence[Span]] | None = None,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> CompressedContext:
    """Read rows with spans folded into slots and forget the spans.

    Args:
        model: Decoder with sentinels, PEFT-wrapped or not.
        input_ids: ``[B, T]`` original tokens.
        sentinels: Its sentinels.
        sampler: Chooses the spans of each row; None = ``SpanSampler()``.
        spans: The spans of each row, over its own tokens, instead of a sampler.
        attention_mask: ``[B, T]``, 0 at padding on either side; None = no padding.
        chunk_size: None = one masked pass, then one eviction; else columns of a chunk. Both give the same context.
        seed: Row i draws its spans from (seed, i).
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    rows = [ids[mask] for ids, mask in zip(input_ids, real, strict=True)]
    if not all(row.numel() for row in rows):
        raise ValueError("every row of a context needs at least one token; drop empty rows")
    forget: list[int] | None = None
    if spans is None:
        chosen = SpanSampler() if sampler is None else sampler
        if isinstance(chosen, SpanSampler):
            counts = [chosen.forget(row.numel(), sentinels.slots) for row in rows]
            forget = [count for count in counts if count is not None] or None
        draws = (random.Random(f"{seed} {number}") for number in range(len(rows)))
        spans = [
            chosen(row.numel(), slots=sentinels.slots, generator=draw) for row, draw in zip(rows, draws, strict=True)
        ]
    layout = SpanLayout.from_spans(rows, spans, sentinels, forget=forget).to(input_ids.device)
    cache = EvictingCache()
    last = layout.plain_index.gather(1, layout.num_tokens[:, None] - 1)
    if chunk_size is None:
        wanted, place = torch.unique(last, return_inverse=True)
        columns, cache.forget = continued(layout, cache), layout.forget
        logits = feed(model, cache, columns, logits_to_keep=wanted)
        cache.forget = None
        next_logits = logits[torch.arange(len(rows), device=logits.device), place[:, 0]]
        cache.evict(layout.needed(layout.kind.shape[1] - 1))
    else:
        next_logits = _at_columns(stream(model, layout, chunk_size, cache), last)
    weights = weights_digest(model, sentinels.ids)
    return CompressedContext(cache, sentinels, layout.num_tokens, suppress(next_logits, sentinels), weights)


def _at_columns(chunks: Iterator[Tensor], column: Tensor) -> Tensor:
    """Pick one column ``[B, 1]`` of each row out of chunks of logits ``[B, T, V]``; returns ``[B, V]``."""
    first = next(chunks)
    picked, start = first.new_empty(first.shape[0], first.shape[2]), 0
    for logits in chain([first], chunks):
        place = (column - start).clamp(0, logits.shape[1] - 1)
        here = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[2]))[:, 0]
        picked = torch.where(column >= start, here, picked)
        start += logits.shape[1]
    return picked
