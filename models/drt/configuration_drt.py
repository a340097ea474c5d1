"""Configuration of the Differentiable Retrieval-based Transformer; the defaults are the published 128M model."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from transformers import PreTrainedConfig

from models.checks import (
    AttentionImplementation,
    GCAImplementation,
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
    "encoder_layers": "num_encoder_layers",
    "enc_chunk_size": "chunk_size",
    "chunk_topk": "chunk_top_k",
    "rms_norm_eps": "rms_norm_eps",
    "chunk_id": "landmark_token_id",
    "bos_id": "bos_token_id",
    "pad_id": "pad_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
# The published kernel zeroed the landmark key exactly when a chunk with its landmark filled whole tiles of 64 keys,
# which is the off-by-one softmax over the other keys; the option of that name did nothing.
_PUBLISHED_TILE = 64


class DRTConfig(PreTrainedConfig):
    """Sizes and options of a DRT.

    Args:
        vocab_size: Rows of the embedding, landmark included.
        hidden_size: Model width.
        intermediate_size: Width of the SwiGLU MLP.
        num_attention_heads: Query heads of all attentions; key/value heads of the chunk encoder.
        num_key_value_heads: Key/value heads of the window attention; None = num_attention_heads.
        chunk_num_key_value_heads: Key/value heads of the chunk memory; None = num_key_value_heads.
        num_lower_layers: Blocks below the chunk memory.
        layers_per_group: Upper blocks of each group; the blocks of a group share one retrieval.
        num_encoder_layers: Bidirectional blocks over each chunk.
        chunk_size: Text tokens of a chunk, landmark excluded.
        chunk_top_k: Chunks retrieved for every chunk.
        window_size: Positions (landmarks counted) a position sees, itself included.
        softmax_off_by_one: Add 1 to the softmax denominator of the retrieved chunks' attention.
        retrieval_noise: Noise on the retrieval scores in training mode.
        rms_norm_eps: Epsilon of the norms of the decoder.
        query_norm_eps: Epsilon of the norms before the retrieval queries.
        encoder_rms_norm_eps: Epsilon of the norms of the chunk encoder.
        encoder_rope_theta: Base of the rotary positions inside a chunk.
        landmark_token_id: Token inserted after every chunk.
        bos_token_id: Begin of text.
        eos_token_id: End of text.
        pad_token_id: Padding; its embedding starts at zero.
        tie_word_embeddings: Must be True.
        initializer_range: Standard deviation of the initial weights.
        offload_chunk_memory: Let ``generate`` keep chunk keys and values in host memory.
        gca_implementation: Kernel of grouped cross attention.
        attention_implementation: Kernel of the window attention.
        use_cache: Keep a cache in evaluation mode.
        **kwargs: Fields of ``PreTrainedConfig``.
    """

    model_type = "drt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int = 50265,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        chunk_num_key_value_heads: int | None = None,
        num_lower_layers: int = 6,
        layers_per_group: Sequence[int] = (6,),
        num_encoder_layers: int = 2,
        chunk_size: int = 63,
        chunk_top_k: int = 8,
        window_size: int = 513,
        softmax_off_by_one: bool = True,
        retrieval_noise: Literal["gumbel"] | None = "gumbel",
        rms_norm_eps: float = 1e-5,
        query_norm_eps: float = 1e-5,
        encoder_rms_norm_eps: float = 1e-6,
        encoder_rope_theta: float = 10000.0,
        landmark_token_id: int = 50264,
        bos_token_id: int | None = 50256,
        eos_token_id: int | None = 50256,
        pad_token_id: int | None = 50257,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        offload_chunk_memory: bool = False,
        gca_implementation: GCAImplementation = "auto",
        attention_implementation: AttentionImplementation = "auto",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        """Set all fields and check them."""
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.chunk_num_key_value_heads = (
            self.num_key_value_heads if chunk_num_key_value_heads is None else chunk_num_key_value_heads
        )
        self.num_lower_layers = num_lower_layers
        self.layers_per_group = list(layers_per_group)
        self.num_encoder_layers = num_encoder_layers
        self.chunk_size, self.chunk_top_k, self.window_size = chunk_size, chunk_top_k, window_size
        self.softmax_off_by_one = softmax_off_by_one
        self.retrieval_noise = retrieval_noise
        self.rms_norm_eps, self.query_norm_eps = rms_norm_eps, query_norm_eps
        self.encoder_rms_norm_eps = encoder_rms_norm_eps
        self.encoder_rope_theta = encoder_rope_theta
        self.landmark_token_id = landmark_token_id
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.initializer_range = initializer_range
        self.offload_chunk_memory = offload_chunk_memory
        self.gca_implementation, self.attention_implementation = gca_implementation, attention_implementation
        self.use_cache = use_cache
        self._check()
        self.num_hidden_layers = num_lower_layers + sum(self.layers_per_group)
        if kwargs.pop("num_hidden_layers", self.num_hidden_layers) != self.num_hidden_layers:
            raise ValueError("num_hidden_layers follows from num_lower_layers and layers_per_group, leave it out")
        super().__init__(**kwargs)

    def _check(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        more = ("chunk_num_key_value_heads", "num_lower_layers", "num_encoder_layers", "chunk_size", "chunk_top_k")
        check_positive({name: getattr(self, name) for name in (*sizes, *more, "window_size")})
        if not self.layers_per_group:
            raise ValueError("layers_per_group must name at least one group of upper layers, got an empty list")
        check_positive({f"layers_per_group[{i}]": layers for i, layers in enumerate(self.layers_per_group)})
        kv_heads = {name: getattr(self, name) for name in ("num_key_value_heads", "chunk_num_key_value_heads")}
        check_heads(self.hidden_size, self.num_attention_heads, kv_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads must be even for rotary positions, got {self.head_dim}"
            )
        ids = ("landmark_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        check_token_ids(self.vocab_size, {name: getattr(self, name) for name in ids})
        if self.landmark_token_id is None or self.landmark_token_id == self.pad_token_id:
            raise ValueError(
                f"landmark_token_id must be a token of its own, got {self.landmark_token_id} "
                f"(pad_token_id {self.pad_token_id})"
            )
        check_choice("retrieval_noise", self.retrieval_noise, Literal["gumbel", None])
        check_choice("gca_implementation", self.gca_implementation, GCAImplementation)
        check_choice("attention_implementation", self.attention_implementation, AttentionImplementation)
        check_tied(self.tie_word_embeddings)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_reference_config(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        """Translate a published configuration.

        Args:
            mapping: The published keys and values; keys that never had an effect are ignored.
            **overrides: Fields of this class that replace the translated ones.

        Raises:
            ValueError: If ALiBi is switched off, or a field is out of range.
        """
        ignored = frozenset({"num_hidden_layers", "slide_window", "decoder_layers"})
        fields = map_config(mapping, _RENAMES, ignored=ignored)
        if "bos_token_id" in fields:
            fields["eos_token_id"] = fields["bos_token_id"]
        if "num_attention_heads" in fields:
            fields["chunk_num_key_value_heads"] = fields["num_attention_heads"]
        if mapping.get("slide_window") is not None:
            fields["window_size"] = mapping["slide_window"] + 1
        if mapping.get("decoder_layers"):
            fields["num_lower_layers"], *fields["layers_per_group"] = mapping["decoder_layers"]
        chunk_size = fields.get("chunk_size", 63)
        fields["softmax_off_by_one"] = (chunk_size + 1) % _PUBLISHED_TILE == 0
        return cls(**{**fields, **overrides})
