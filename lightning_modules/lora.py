"""LoRA adapters on any Hugging Face causal LM, through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

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


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters on a model."""
    return hasattr(model, "peft_config")


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write a PEFT adapter folder, without any full embedding.

    Raises:
        ValueError: the model has no adapter.
    """
    if not has_adapters(model):
        raise ValueError("the model has no adapter: save the model itself")
    # What PEFT decides by itself ("auto") depends on whether it can look at the original model.
    model.save_pretrained(folder, save_embedding_layers=False)


class Companion(Protocol):
    """What is saved beside a model, such as its sentinels."""

    def save(self, folder: str | Path) -> None:
        """Write it into a folder."""


class MergedModel:
    """A model whose adapters are added to its weights when it is saved; the model itself stays as it is.

    Args:
        model: with adapters or without.
        companion: saved beside it.
    """

    def __init__(self, model: Any, companion: Companion | None = None):
        self.model, self.companion = model, companion
        self.dtype: torch.dtype | None = None
        self.num_saved = 0
        """Parameters of what was saved last, adapters being part of others."""

    def to(self, dtype: torch.dtype) -> MergedModel:
        """Choose the dtype of what is saved; adapters are added before the weights are rounded."""
        self.dtype = dtype
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face model folder, and the companion."""
        merged = self.merged()
        merged.save_pretrained(folder)
        self.num_saved = sum(parameter.numel() for parameter in merged.parameters())
        if self.companion is not None:
            self.companion.save(folder)

    def merged(self) -> PreTrainedModel:
        """Return a plain copy of the model, adapters added."""
        copy = deepcopy(self.model)
        plain = copy.merge_and_unload() if has_adapters(copy) else copy
        return plain if self.dtype is None else plain.to(self.dtype)
