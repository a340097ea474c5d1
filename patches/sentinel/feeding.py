"""One forward call over an evicting cache: register the columns, choose mask or none, run the model.

Legend: B batch, T columns of a call, P physical cache entries, N wanted columns, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patches.rules import as_attention_mask, index_mask, sentinel
from patches.rules_form import text_config, unwrapped, uses_flash_attention
from patches.rules_kinds import PAD, PLAIN
from patches.sentinel.cache import EvictingCache


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns to feed; those of kind PAD leave holes in the cache and see only themselves."""

    input_ids: Tensor
    """``[B, T]``."""
    kind: Tensor
    """``[B, T]``."""
    span: Tensor
    """``[B, T]``."""
    position_ids: Tensor
    """``[B, T]``."""
    all_visible: bool = False
    """The columns are plain and see each other, causally, and every live entry."""

    @classmethod
    def plain(cls, input_ids: Tensor, position_ids: Tensor, valid: Tensor | None = None) -> "Columns":
        """Return columns ``[B, T]`` outside any span, over a cache whose spans are all closed; invalid is padding."""
        outside = torch.zeros_like(input_ids)
        if valid is None:
            return cls(input_ids, outside + PLAIN, outside, position_ids, all_visible=True)
        return cls(input_ids, torch.where(valid, PLAIN, PAD), outside, position_ids)

    def part(self, start: int, stop: int) -> "Columns":
        """Return columns from `start` to `stop`."""
        ids, kind, span, positions = (
            field[:, start:stop] for field in (self.input_ids, self.kind, self.span, self.position_ids)
        )
        return Columns(ids, kind, span, positions, self.all_visible)


def feed(model: nn.Module, cache: EvictingCache, columns: Columns, *, logits_to_keep: Tensor | None = None) -> Tensor:
    """Append columns to a cache and run them through the model, attending by the sentinel rule to what is live.

    Args:
        model: Decoder, PEFT-wrapped or not.
        cache: Live entries; changed in place.
        columns: What to feed.
        logits_to_keep: Columns ``[N]`` whose logits are wanted; None = all.

    Returns:
        Raw logits ``[B, T, V]`` (or ``[B, N, V]``).
    """
    refuse_other_cache(model, cache)
    valid = None if columns.all_visible else columns.kind != PAD
    cache.append(kind=columns.kind, span=columns.span, position_ids=columns.position_ids, valid=valid)
    num_new = columns.kind.shape[1]
    with _attention(model, needs_mask=not _can_go_unmasked(model, cache, columns)) as masked:
        choice = logits_to_keep is not None and _chooses_logits(model)
        out = model(
            input_ids=columns.input_ids,
            attention_mask=_mask(model, cache, num_new) if masked else None,
            position_ids=columns.position_ids,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": logits_to_keep} if choice else {}),
        )
    return out.logits if choice or logits_to_keep is None else out.logits[:, logits_to_keep]


def refuse_other_cache(model: nn.Module, cache: EvictingCache) -> None:
    """Refuse a cache that another model filled, as far as its shape tells.

    Raises:
        ValueError: other numbers of layers or heads.
    """
    if not cache.layers or not cache.layers[0].is_initialized:
        return
    config = text_config(model)
    # Some families keep a number of key-value heads that they do not use.
    heads = {config.num_attention_heads, getattr(config, "num_key_value_heads", None)} - {None}
    held = len(cache.layers), cache.layers[0].keys.shape[1]
    if held[0] != config.num_hidden_layers or held[1] not in heads:
        raise ValueError(
            f"the cache is of another model: it holds {held[0]} layers of {held[1]} heads, the model has "
            f"{config.num_hidden_layers} of {min(heads)}; continue it with the model that read the context"
        )


def _mask(model: nn.Module, cache: EvictingCache, num_new: int) -> object:
    """Return the mask of the newest entries over all of them; places in the cache serve as indices."""
    places = torch.arange(cache.num_physical, device=cache.kind.device).expand_as(cache.kind)
    return as_attention_mask(
        model,
        sentinel(cache),
        query_index=places[:, -num_new:],
        key_index=places,
        query_position_ids=cache.position_ids[:, -num_new:],
        key_position_ids=cache.position_ids,
    )


def _can_go_unmasked(model: nn.Module, cache: EvictingCache, columns: Columns) -> bool:
    """Say whether plain causal attention over the physical entries is what the rule asks for, and pays.

    A single query, or a first call, needs no mask then, which keeps the fast paths open; flash attention never takes
    one.
    """
    config = text_config(model)
    windows = getattr(config, "sliding_window", None) is not None
    if windows or cache.has_holes:
        return False
    if columns.all_visible:
        return columns.kind.shape[1] in (1, cache.num_physical) or uses_flash_attention(model)
    return uses_flash_attention(model) and _sees_everything(cache, columns)


def _sees_everything(cache: EvictingCache, columns: Columns) -> bool:
    """Say whether all columns are plain, of one span, and the last of them sees every entry."""
    places = torch.arange(cache.num_physical, device=cache.kind.device).expand_as(cache.kind)
    alike = (columns.kind == PLAIN) & (columns.span == columns.span[:, -1:])
    return bool(alike.all() & index_mask(sentinel(cache), places[:, -1:], places).all())


@contextmanager
def _attention(model: nn.Module, *, needs_mask: bool) -> Iterator[bool]:
    """Lend the model sdpa for a call that needs a mask, if its own attention takes none; yields `needs_mask`."""
    config = unwrapped(model).config
    own = config._attn_implementation
    borrow = needs_mask and uses_flash_attention(model)
    if borrow:
        config._attn_implementation = "sdpa"
    try:
        yield needs_mask
    finally:
        if borrow:
            config._attn_implementation = own


def _chooses_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
