"""Finished models and their tokenizers, from folders or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import models  # noqa: F401 - registers the suite's models with transformers' Auto classes
from evaluation.results import digest
from models.pretrained import load_config


def load_model(name: str, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a causal language model in evaluation mode.

    Raises:
        ValueError: the files are damaged, or lack some of the weights.
        OSError: there is no such model.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except OSError:
        raise
    except Exception as error:  # damaged files end in any kind of error
        raise ValueError(f"the model {name} does not load: {_first_line(error)}") from error
    if found["missing_keys"]:
        # The library would go on with random numbers in their place.
        raise ValueError(f"the model {name} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])} ...")
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any | None:
    """Load the tokenizer of a model; None if it has none.

    Raises:
        ValueError: the folder holds a damaged one.
        FileNotFoundError: neither a folder nor a name that the hub answers to.
    """
    is_folder = Path(name).is_dir()
    if not is_folder:
        load_config(name)
    if is_folder and not (Path(name) / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as above
        if is_folder:
            raise ValueError(f"the tokenizer in {name} does not load: {_first_line(error)}") from error
        return None
    return tokenizer if hasattr(tokenizer, "backend_tokenizer") else None


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a digest of all that decides which tokens a text becomes."""
    whole = getattr(tokenizer, "backend_tokenizer", None)
    if whole is None:
        return digest(sorted(tokenizer.get_vocab().items()))
    # A call that pads or truncates leaves these two behind.
    return digest(json.loads(whole.to_str()) | {"padding": None, "truncation": None})


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model says it takes; None if it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def has_position_table(config: PreTrainedConfig) -> bool:
    """Say whether the limit is that of a table: beyond it there is nothing to look up, while rotary positions go on."""
    return max_positions(config) is not None and not getattr(config.get_text_config(), "rope_parameters", None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
