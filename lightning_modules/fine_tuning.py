"""What the fine-tuning methods share: where the model comes from, its rotary base, its adapters, seeds of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lightning_modules.lora import add_lora
from models.pretrained import load_causal_lm, override_model_rope


def build_model(
    model: str | PreTrainedModel | Callable[[], PreTrainedModel], *, lora: Mapping[str, Any] | None, **rope: Any
) -> Any:
    """The model to train: loaded, built or given; with its rotary base and its adapters."""
    if isinstance(model, str):
        built = load_causal_lm(model, **rope)
    else:
        built = model if isinstance(model, PreTrainedModel) else model()
        theta, length, keep = rope.values()
        override_model_rope(built, theta=theta, context_length=length, keep_scaling=keep)
    return built if lora is None else add_lora(built, lora)


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> 1)
