"""LoRA adapters on any Hugging Face causal LM, through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, options: Mapping[str, Any]) -> Any:
    """Freeze a model and add trainable low-rank adapters; a fresh adapter changes no output.

    Args:
        model: the causal LM, changed in place.
        options: of ``peft.LoraConfig``: ``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``, ...

    Returns:
        The ``peft.PeftModel``.

    Raises:
        ValueError: PEFT refuses the options.
    """
    from peft import LoraConfig, get_peft_model  # a second to import, which full fine-tuning need not pay

    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora={dict(options)} is refused by PEFT: {error}") from error


def trained_names(module: nn.Module) -> set[str]:
    """Names in the state dict of a module that training changes: trainable parameters."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def is_adapted(model: nn.Module) -> bool:
    """Whether some parameters are frozen, so that a checkpoint need not hold them."""
    return any(not parameter.requires_grad for parameter in model.parameters())


def only_trained(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a state dict that training changes."""
    names = trained_names(module)
    return {name: tensor for name, tensor in state_dict.items() if name in names}
