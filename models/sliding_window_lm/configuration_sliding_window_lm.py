"""Configuration of the sliding-window language model; the defaults are the published baseline with 12 layers."""

from collections.abc import Mapping
from typing import Any, Self

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
# Options of the retrieval model, which shares its published config files with this one.
_OF_RETRIEVAL = frozenset({"chunk_id", "enc_chunk_size", "chunk_topk", "encoder_layers"})
_HANDLED = frozenset({"slide_window", "decoder_layers", "num_hidden_layers"})


class SlidingWindowLMConfig(PreTrainedConfig):
    """Sizes and options of a sliding-window language model.

    Args:
        vocab_size: Rows of the embedding.
        hidden_size: Model width.
        intermediate_size: Width of the SwiGLU MLP.
        num_hidden_layers: Blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; None = num_attention_heads.
        window_size: Positions a position sees, itself included.
        rms_norm_eps: Epsilon of the norms.
        bos_token_id: Begin of text.
        eos_token_id: End of text.
        pad_token_id: Padding; its embedding starts at zero.
        tie_word_embeddings: Must be True.
        initializer_range: Standard deviation of the initial weights.
        attention_implementation: Kernel of the window attention.
        use_cache: Keep a cache in evaluation mode.
        **kwargs: Fields of ``PreTrainedConfig``.
    """

    model_type = "sliding_window_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int = 50265,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        window_size: int = 513,
        rms_norm_eps: float = 1e-5,
        bos_token_id: int | None = 50256,
        eos_token_id: int | None = 50256,
        pad_token_id: int | None = 50257,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        attention_implementation: AttentionImplementation = "auto",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        """Set all fields and check them."""
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.window_size = window_size
        self.rms_norm_eps = rms_norm_eps
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.initializer_range = initializer_range
        self.attention_implementation = attention_implementation
        self.use_cache = use_cache
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_positive({name: getattr(self, name) for name in (*sizes, "num_key_value_heads", "window_size")})
        kv_heads = {"num_key_value_heads": self.num_key_value_heads}
        check_heads(self.hidden_size, self.num_attention_heads, kv_heads)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        check_token_ids(self.vocab_size, {name: getattr(self, name) for name in ids})
        check_choice("attention_implementation", self.attention_implementation, AttentionImplementation)
        check_tied(self.tie_word_embeddings)

    @classmethod
    def from_reference_config(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        """Translate a published configuration.

        Args:
            mapping: The published keys and values; keys of the retrieval model and dead keys are ignored.
            **overrides: Fields of this class that replace the translated ones.

        Raises:
            ValueError: If ALiBi is switched off, or a field is out of range.
        """
        fields = map_config(mapping, _RENAMES, ignored=_OF_RETRIEVAL | _HANDLED)
        if "bos_token_id" in fields:
            fields["eos_token_id"] = fields["bos_token_id"]
        if mapping.get("slide_window") is not None:
            fields["window_size"] = mapping["slide_window"] + 1
        layers = mapping.get("num_hidden_layers", -1)
        if layers != -1:
            fields["num_hidden_layers"] = layers
        elif mapping.get("decoder_layers"):
            fields["num_hidden_layers"] = sum(mapping["decoder_layers"])
        return cls(**{**fields, **overrides})
