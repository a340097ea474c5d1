"""Which models can encode pieces in parallel, where their decoder is, and what identifies them."""

import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from patches.weights_identity import weights_digest

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox", "phi3")
SUITE_MODELS = ("drt", "sliding_window_lm")
GROWING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the greatest position of a call."""


def text_config(model: Any) -> Any:
    """Return the configuration of the text decoder."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def causal_lm(model: Any) -> Any:
    """Return the Hugging Face model inside adapters.

    Raises:
        ValueError: If the model is of no supported family.
    """
    adapters = getattr(model, "active_peft_config", None)
    if adapters is not None and getattr(adapters, "is_prompt_learning", False):
        raise ValueError("adapters that learn prompts add positions of their own; merge or remove them before binding")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "config") or not hasattr(base, "get_decoder"):
        raise ValueError(f"parallel context needs a Hugging Face causal language model, got {type(model).__name__}")
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head; load it with AutoModelForCausalLM")
    name = text_config(base).model_type
    if name in SUITE_MODELS:
        raise ValueError(
            f"{name} has no keys at rotary positions that pieces could share (it reads a chunk memory or ALiBi "
            f"distances); parallel context serves {', '.join(FAMILIES)}"
        )
    if name not in FAMILIES:
        raise ValueError(f"no parallel context for model type {name!r}; supported are {', '.join(FAMILIES)}")
    if getattr(text_config(base), "use_bidirectional_attention", False):
        raise ValueError("this model attends in both directions; parallel context needs a causal decoder")
    return base


def attention_configs(model: nn.Module) -> list[Any]:
    """Return the distinct configurations that the model's modules choose their attention by."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def rope_parameters(model: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters of every layer type."""
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        yield from (value for value in parameters.values() if value)
    else:
        yield parameters


def position_limit(model: Any) -> int | None:
    """Return the length below which all positions must stay; None: no limit."""
    config = text_config(model)
    limits = [
        int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in rope_parameters(model)
        if rope.get("rope_type") in GROWING_ROPE
    ]
    return min(limits, default=None)


def check_positions(model: Any, greatest: float) -> None:
    """Raise a ValueError if a rotary embedding would change its angles at position ``greatest``."""
    limit = position_limit(model)
    if limit is not None and greatest >= limit:
        raise ValueError(
            f"this model's rotary angles change with the greatest position, so positions must stay below {limit}, got "
            f"{int(greatest)}; use shorter or more pieces"
        )


def model_fingerprint(model: Any) -> dict[str, Any]:
    """Return what two models must share to use each other's keys: family, sizes, rotary parameters and weights."""
    config = text_config(model.get_base_model() if hasattr(model, "get_base_model") else model)
    names = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "layer_types",
        "rope_parameters",
    )
    fields = {name: getattr(config, name, None) for name in names}
    fields["weights"] = weights_digest(model)
    return json.loads(json.dumps(fields, sort_keys=True, default=str))
