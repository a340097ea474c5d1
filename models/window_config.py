"""What the configurations of the window-attention models have in common.

Notable: transformers turns configuration classes into dataclasses, so a field is one annotated line and a subclass adds
its own. ``__post_init__`` derives and checks.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from models.checks import (
    AttentionImplementation,
    check_choice,
    check_heads,
    check_positive,
    check_tied,
    check_token_ids,
)
from models.reference_layout import map_config

_RENAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "bos_id": "bos_token_id",
    "pad_id": "pad_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}


class WindowConfig(PreTrainedConfig):
    """Sizes and options of a decoder with window attention and ALiBi.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Model width.
        intermediate_size: Width of the SwiGLU MLP.
        num_attention_heads: Query heads of all attentions.
        num_key_value_heads: Key/value heads of the window attention; None = num_attention_heads.
        window_size: Positions a position sees, itself included.
        rms_norm_eps: Epsilon of the norms of the decoder.
        bos_token_id: Begin of text.
        eos_token_id: End of text.
        pad_token_id: Padding; its embedding starts at zero.
        tie_word_embeddings: Must be True.
        initializer_range: Standard deviation of the initial weights.
        attention_implementation: Kernel of the window attention.
        use_cache: Keep a cache in evaluation mode.
    """

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    window_size: int = 513
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = 50257
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    attention_implementation: AttentionImplementation = "auto"
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive and check what all have; ``kwargs`` are fields of ``PreTrainedConfig``."""
        self.num_key_value_heads = self.num_kv_heads
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        check_positive({name: getattr(self, name) for name in (*sizes, "window_size")})
        check_heads(self.hidden_size, self.num_attention_heads, {"num_key_value_heads": self.num_kv_heads})
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        check_token_ids(self.vocab_size, {name: getattr(self, name) for name in ids})
        check_choice("attention_implementation", self.attention_implementation, AttentionImplementation)
        check_tied(self.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the window attention."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads


def published_fields(
    mapping: Mapping[str, Any], renames: Mapping[str, str], *, ignored: frozenset[str]
) -> dict[str, Any]:
    """Translate the keys of a published configuration that all models share, and those of ``renames``.

    Raises:
        ValueError: If ALiBi is switched off.
    """
    fields = map_config(mapping, {**_RENAMES, **renames}, ignored=ignored | {"slide_window"})
    if "bos_token_id" in fields:
        fields["eos_token_id"] = fields["bos_token_id"]
    if mapping.get("slide_window") is not None:
        fields["window_size"] = mapping["slide_window"] + 1
    return fields
