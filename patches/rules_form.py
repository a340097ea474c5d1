"""The form in which a model and its attention implementation take a rule. The only place that decides it.

Legend: B batch, T queries, S keys.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from patches.rules_dense import Rule, at_indices, evaluate

Mask: TypeAlias = Any
"""A bool or float tensor ``[B, 1, T, S]``, or flex-attention's `BlockMask` (not importable on every platform)."""

ALIBI_MODELS = ("bloom", "mpt")
LAYER_TYPES = ("full_attention", "sliding_attention")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: nn.Module) -> PretrainedConfig:
    """Return the configuration of the decoder."""
    return unwrapped(model).config.get_text_config(decoder=True)


def uses_flash_attention(model: nn.Module) -> bool:
    """Say whether the model's attention is one of the flash-attention packages, which take no mask."""
    return "flash" in str(text_config(model)._attn_implementation)


def as_attention_mask(
    model: nn.Module,
    rule: Rule,
    *,
    query_index: Tensor,
    key_index: Tensor | None = None,
    query_position_ids: Tensor | None = None,
    key_position_ids: Tensor | None = None,
) -> Mask | Mapping[str, Mask]:
    """Return the `attention_mask` that makes this model attend by a rule, sliding windows kept.

    Args:
        model: A transformers decoder, PEFT-wrapped or not; its current attention implementation counts.
        rule: Rule over logical indices.
        query_index: ``[B, T]`` int64, logical index of each query; -1 = hole.
        key_index: ``[B, S]`` int64, logical index of each key; None = the queries.
        query_position_ids: ``[B, T]``, by which windows measure distance; None = the indices.
        key_position_ids: ``[B, S]``; None = the positions of the queries if these are the keys, else the indices.

    Returns:
        sdpa: bool, True = visible. eager: float of the model's dtype, 0 or ``finfo(dtype).min``. flex_attention:
        `BlockMask`. Each ``[B, 1, T, S]``, or, for models with sliding and full layers, a dictionary of both.

    Raises:
        ValueError: if the model cannot attend by an arbitrary rule; the message says what to use instead.
    """
    config = text_config(model)
    _check(model, config, query_index.device)
    if key_index is None:
        key_index = query_index
        key_position_ids = query_position_ids if key_position_ids is None else key_position_ids
    query_positions = query_index if query_position_ids is None else query_position_ids
    key_positions = key_index if key_position_ids is None else key_position_ids
    full = at_indices(rule, query_index, key_index)
    sizes = (query_index.shape[0], query_index.shape[1], key_index.shape[1])
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if layer_types is None:
        return _form(model, _within(full, query_positions, key_positions, window), sizes, query_index.device)
    mask = _form(model, full, sizes, query_index.device)
    if "sliding_attention" not in layer_types:
        return mask
    sliding = _within(full, query_positions, key_positions, window)
    return {"full_attention": mask, "sliding_attention": _form(model, sliding, sizes, query_index.device)}


def _within(rule: Rule, query_positions: Tensor, key_positions: Tensor, window: int | None) -> Rule:
    """Restrict a rule over places to keys at a distance below the window."""
    if window is None:
        return rule

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = query_positions[batch, query] - key_positions[batch, key] < window
        return rule(batch, head, query, key) & near

    return visible


def _form(model: nn.Module, rule: Rule, sizes: tuple[int, int, int], device: torch.device) -> Mask:
    implementation = text_config(model)._attn_implementation
    if implementation == "flex_attention":
        batch_size, num_queries, num_keys = sizes
        return _block_mask_builder()(rule, batch_size, None, num_queries, num_keys, device=device)
    visible = evaluate(rule, *sizes, device)
    if implementation == "sdpa":
        return visible
    # Eager attention adds the mask to the scores: a bool one would be taken as 0 and 1.
    dtype = unwrapped(model).dtype
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
    return torch.where(visible, torch.zeros((), dtype=dtype, device=device), hidden)


@cache
def _block_mask_builder() -> Callable[..., Any]:
    """Return the compiled constructor of block masks; without compilation it would hold all pairs of indices."""
    from torch.nn.attention.flex_attention import create_block_mask  # not on every platform

    return torch.compile(create_block_mask)


def _check(model: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
    """Refuse models that would ignore the rule or break it silently."""
    name = config._attn_implementation
    if uses_flash_attention(model):
        raise ValueError(
            f"{name} takes no attention mask; use attn_implementation='sdpa' or 'flex_attention', "
            "or recurrent_forward, which needs none for plain chunks"
        )
    if name not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(f"unknown attention implementation {name!r}; use 'sdpa', 'eager' or 'flex_attention'")
    if name == "flex_attention":
        if device.type == "cpu":
            raise ValueError("flex_attention has no backward pass on a CPU; use attn_implementation='sdpa'")
        if model.training and (getattr(config, "attention_dropout", 0.0) or 0.0) > 0:
            raise ValueError(
                f"flex_attention has no dropout, got attention_dropout={config.attention_dropout}; "
                "set it to 0 or use attn_implementation='sdpa'"
            )
    if config.model_type in ALIBI_MODELS or getattr(config, "alibi", False):
        raise ValueError(
            f"{config.model_type} biases scores by key index (ALiBi) and ignores position ids; use a model with "
            "rotary or learned positions"
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if others:
        raise ValueError(f"rules reach layers of type {' and '.join(LAYER_TYPES)}, this model has {', '.join(others)}")
