"""Load any Hugging Face causal LM, and give it another rotary base before it computes anything.

Notable: transformers 5 keeps rotary settings in ``config.rope_parameters`` and computes the frequencies once, when a
rotary module is built. Editing the configuration of a finished model changes nothing until it is saved and loaded
again, and then it does. Here both move together.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# What remains of the rotary settings when scaling is dropped.
_UNSCALED = ("rope_theta", "partial_rotary_factor")


def load_config(name: str) -> PreTrainedConfig:
    """Read the configuration of a model.

    Args:
        name: model folder or hub name.

    Raises:
        FileNotFoundError: there is no such folder, and the hub does not answer to the name.
        OSError: the folder has no configuration, or a damaged one.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"no model {name}: neither a folder nor a name that the hub answers to from here"
        ) from error
    return config


def load_causal_lm(
    path: str,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    attn_implementation: str | None = None,
    rope_theta: float | None = None,
    context_length: int | None = None,
    keep_rope_scaling: bool = False,
) -> PreTrainedModel:
    """Load a causal LM from a folder or by hub name.

    Args:
        path: model folder or hub name.
        dtype: dtype of the weights; ``auto`` is that of the file.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None is the library's choice.
        rope_theta: rotary base, see `override_rope`.
        context_length: ``max_position_embeddings``, see `override_rope`.
        keep_rope_scaling: see `override_rope`.

    Raises:
        ValueError: as `override_rope`, or the attention implementation is not installed.
        OSError: there is no such model.
    """
    config = load_config(path)
    override_rope(config, theta=rope_theta, context_length=context_length, keep_scaling=keep_rope_scaling)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attn_implementation
        )
    except ImportError as error:
        if attn_implementation is None:
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"attn_implementation={attn_implementation} is not there ({reason}): choose sdpa, or install the package"
        ) from error


def override_rope(
    config: PreTrainedConfig, *, theta: float | None, context_length: int | None, keep_scaling: bool = False
) -> None:
    """Edit the rotary base and the trained context length of a configuration in place.

    Args:
        config: of a model that is built afterwards; for a finished model see `override_model_rope`.
        theta: new rotary base. The rotary type becomes ``default`` and any scaling is dropped (with a warning).
        context_length: new ``max_position_embeddings``.
        keep_scaling: change the base only and leave the scaling as it is.

    Raises:
        ValueError: the model has no rotary positions or several settings of them, a number is not positive, or
            ``keep_scaling`` without a base.
    """
    if keep_scaling and theta is None:
        raise ValueError("keep_rope_scaling has no effect without rope_theta: pass rope_theta, or leave it out")
    if context_length is not None:
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        config.max_position_embeddings = context_length
    if theta is None:
        return
    if not theta > 0:
        raise ValueError(f"rope_theta must be above 0, got {theta}")
    before = one_rope_setting(config, "rope_theta")
    scaled = before.get("rope_type", "default") != "default"
    after = dict(before) if keep_scaling else unscaled_rope(before)
    after["rope_theta"] = float(theta)
    if not keep_scaling:
        after["rope_type"] = "default"
        if scaled:
            logger.warning("rope_theta=%s drops the rotary scaling %s of this model", theta, before)
    config.rope_parameters = after


def override_model_rope(
    model: PreTrainedModel, *, theta: float | None, context_length: int | None, keep_scaling: bool = False
) -> None:
    """`override_rope` for a finished model: its rotary modules are built again from the edited configuration.

    Raises:
        ValueError: as `override_rope`, or the rotary modules of this class cannot be built from a configuration.
    """
    override_rope(model.config, theta=theta, context_length=context_length, keep_scaling=keep_scaling)
    if theta is not None:
        rebuild_rotary(model)


def rebuild_rotary(model: PreTrainedModel) -> list[nn.Module]:
    """Build the rotary modules of a finished model again from its configuration; return the new ones.

    Raises:
        ValueError: the rotary modules of this class cannot be built from a configuration.
    """
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "inv_freq")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary module with inv_freq: load it from a folder instead")
    built = []
    for name, module in found:
        config = deepcopy(module.config)
        config.rope_parameters, config.max_position_embeddings = (
            model.config.rope_parameters,
            model.config.max_position_embeddings,
        )
        built.append(_on(module.inv_freq.device, type(module), config))
        model.set_submodule(name, built[-1])
    return built


def unscaled_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rotary settings without their scaling."""
    return {name: rope[name] for name in _UNSCALED if name in rope}


def _on(device: torch.device, kind: type[nn.Module], config: PreTrainedConfig) -> nn.Module:
    with torch.device(device):
        return kind(config)


def one_rope_setting(config: PreTrainedConfig, option: str) -> dict[str, Any]:
    """Return the rotary settings of a model that ``option`` is to change.

    Raises:
        ValueError: the model has none, or several.
    """
    settings = getattr(config, "rope_parameters", None)
    name = type(config).__name__
    if not settings:
        raise ValueError(f"{option} needs a model with rotary positions, got {name}: leave {option} out")
    if any(isinstance(value, dict) for value in settings.values()):
        raise ValueError(
            f"{name} has a rotary setting for each kind of layer ({', '.join(settings)}): {option} cannot tell which "
            "one is meant; edit rope_parameters in the model's config.json"
        )
    return dict(settings)
