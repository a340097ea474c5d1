"""What the configurations of the models here have in common.

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


class DecoderConfig(PreTrainedConfig):
    """Sizes of a decoder with a tied head.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Model width.
        intermediate_size: Width of the gated MLP.
        num_attention_heads: Query heads of all attentions.
        num_key_value_heads: Key/value heads of the self attention; None = num_attention_heads.
        rms_norm_eps: Epsilon of the norms of the decoder.
        bos_token_id: Begin of text.
        eos_token_id: End of text.
        pad_token_id: Padding; its embedding starts at zero.
        tie_word_embeddings: Must be True.
        initializer_range: Standard deviation of the initial weights.
        use_cache: Keep a cache in evaluation mode.
    """

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = 50257
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive and check what all have; ``kwargs`` are fields of ``PreTrainedConfig``."""
        self.num_key_value_heads = self.num_kv_heads
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        check_positive({name: getattr(self, name) for name in sizes})
        check_heads(self.hidden_size, self.num_attention_heads, {"num_key_value_heads": self.num_kv_heads})
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        check_token_ids(self.vocab_size, {name: getattr(self, name) for name in ids})
        check_tied(self.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the self attention."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    def check_rotary(self) -> None:
        """Raise a ValueError unless heads can be rotated in pairs."""
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads must be even for rotary positions, got {self.head_dim}"
            )

    def check_landmark(self, landmark_token_id: int | None) -> None:
        """Raise a ValueError unless the landmark is a token of its own."""
        check_token_ids(self.vocab_size, {"landmark_token_id": landmark_token_id})
        others = {name: getattr(self, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if landmark_token_id is None or landmark_token_id in others.values():
            raise ValueError(f"landmark_token_id must be a token of its own, got {landmark_token_id} beside {others}")


class WindowConfig(DecoderConfig):
    """Sizes and options of a decoder with window attention and ALiBi.

    Attributes:
        window_size: Positions a position sees, itself included.
        attention_implementation: Kernel of the window attention.
    """

    window_size: int = 513
    attention_implementation: AttentionImplementation = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the window; see ``DecoderConfig``."""
        check_positive({"window_size": self.window_size})
        check_choice("attention_implementation", self.attention_implementation, AttentionImplementation)
        super().__post_init__(**kwargs)


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
