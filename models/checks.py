"""Checks shared by the model configurations; every problem is one sentence for the user."""

from collections.abc import Mapping
from typing import Literal, get_args

GCAImplementation = Literal["auto", "triton", "reference", "cpu"]
AttentionImplementation = Literal["auto", "flash", "sdpa", "reference"]


def check_positive(values: Mapping[str, int]) -> None:
    """Raise a ValueError unless every value is an integer of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_heads(hidden_size: int, num_heads: int, kv_heads: Mapping[str, int]) -> None:
    """Raise a ValueError unless the heads divide the width and the kv heads divide the heads."""
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_heads}")
    for name, value in kv_heads.items():
        if num_heads % value:
            raise ValueError(f"{name} must divide num_attention_heads = {num_heads}, got {value}")


def check_token_ids(vocab_size: int, ids: Mapping[str, int | None]) -> None:
    """Raise a ValueError unless every id is None or inside the vocabulary."""
    for name, value in ids.items():
        if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
            raise ValueError(f"{name} must lie in 0 .. vocab_size - 1 = {vocab_size - 1}, got {value!r}")


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise a ValueError unless ``value`` is one of the options of the Literal ``choices``."""
    options = get_args(choices)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_tied(tie_word_embeddings: bool) -> None:
    """Raise a ValueError if the head is to be separate from the embedding."""
    if not tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be True: the head of this model is the embedding matrix")
