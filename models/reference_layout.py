"""Reading and writing state dicts and configs in the layout of the published implementation."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Keys of published configs that never had an effect, or that name what these models always do.
DEAD_CONFIG_KEYS = frozenset(
    {
        *("activation_function", "architectures", "attention_bias", "auto_map", "chunk_causal_window", "chunk_window"),
        *("dtype", "enable_causal_chunk_attn", "enable_softmax_one", "hcca_per_nlayers", "hidden_act"),
        *("hidden_dropout_prob", "mask_id", "mask_probability", "max_position_embeddings", "model_type"),
        *("torch_dtype", "transformers_version", "use_cache"),
    }
)


def strip_prefixes(state_dict: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Remove each of ``prefixes`` in turn from the names that carry it and drop the ALiBi buffers ``[H]``."""
    named = dict(state_dict)
    for prefix in prefixes:
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return {name: tensor for name, tensor in named.items() if not re.search(r"\.self_attn\.m$", name)}


def check_names(expected: Iterable[str], given: Iterable[str]) -> None:
    """Raise a ValueError that lists missing and unexpected names, if there are any."""
    expected, given = set(expected), set(given)
    problems = [
        f"{kind} {len(names)} ({', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in (("missing", expected - given), ("unexpected", given - expected))
        if names
    ]
    if problems:
        raise ValueError(f"state dict does not fit the model: {'; '.join(problems)}; check the config or the layout")


def load_reference(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool) -> None:
    """Copy a state dict in the published layout into ``model`` (whose ``reference_name`` maps own to published names).

    Matrices are ``[outputs, inputs]``, the embedding ``[V, M]``.

    Raises:
        ValueError: On a wrong shape, on a head that differs from the embedding, with ``strict`` on any other name.
    """
    targets = reference_parameters(model)
    tensors = dict(state_dict)
    head = tensors.pop(HEAD, None)
    if head is not None and EMBEDDING in tensors and not torch.equal(head, tensors[EMBEDDING]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}, but the head of this model is tied to the embedding")
    if strict:
        check_names(targets, tensors)
    with torch.no_grad():
        for name in targets.keys() & tensors.keys():
            if tensors[name].shape != targets[name].shape:
                raise ValueError(
                    f"{name} has shape {list(tensors[name].shape)}, the config asks for {list(targets[name].shape)}"
                )
            targets[name].copy_(tensors[name])


def reference_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Map published names to parameters; the tied head is listed once, as the embedding."""
    rename = model.reference_name
    return {rename(name): parameter for name, parameter in model.named_parameters()}  # type: ignore[operator]


def map_config(mapping: Mapping[str, Any], renames: Mapping[str, str], *, ignored: frozenset[str]) -> dict[str, Any]:
    """Translate a published config to constructor arguments.

    Args:
        mapping: The published config.
        renames: Published key -> own key, for all keys that are understood.
        ignored: Further keys without effect on this model.

    Raises:
        ValueError: If ALiBi is switched off.
    """
    if not mapping.get("enable_alibi", True):
        raise ValueError("enable_alibi=False is not supported: these models have no other position signal")
    known = renames.keys() | ignored | DEAD_CONFIG_KEYS | {"enable_alibi"}
    unknown = sorted(key for key in mapping if key not in known and not key.startswith("rope_"))
    if unknown:
        logger.warning("keys of the published config without effect here: %s", ", ".join(unknown))
    return {own: mapping[key] for key, own in renames.items() if mapping.get(key) is not None}
