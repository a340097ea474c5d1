"""Configuration of the Differentiable Retrieval-based Transformer; the defaults are the published 128M model."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from models.checks import GCAImplementation, check_choice, check_heads, check_positive
from models.window_config import WindowConfig, published_fields

_RENAMES = {
    "encoder_layers": "num_encoder_layers",
    "enc_chunk_size": "chunk_size",
    "chunk_topk": "chunk_top_k",
    "chunk_id": "landmark_token_id",
}
# The published kernel zeroed the landmark key exactly when a chunk with its landmark filled whole tiles of 64 keys,
# which is the off-by-one softmax over the other keys; the option of that name did nothing.
_PUBLISHED_TILE = 64


class DRTConfig(WindowConfig):
    """Sizes and options of a DRT; ``window_size`` counts landmarks, ``vocab_size`` includes the landmark.

    Attributes:
        chunk_num_key_value_heads: Key/value heads of the chunk memory; None = num_key_value_heads. The chunk encoder
            has as many as query heads.
        num_lower_layers: Blocks below the chunk memory.
        layers_per_group: Upper blocks of each group; the blocks of a group share one retrieval.
        num_encoder_layers: Bidirectional blocks over each chunk.
        chunk_size: Text tokens of a chunk, landmark excluded.
        chunk_top_k: Chunks retrieved for every chunk.
        softmax_off_by_one: Add 1 to the softmax denominator of the retrieved chunks' attention.
        retrieval_noise: Noise on the retrieval scores in training mode.
        query_norm_eps: Epsilon of the norms before the retrieval queries.
        encoder_rms_norm_eps: Epsilon of the norms of the chunk encoder.
        encoder_rope_theta: Base of the rotary positions inside a chunk.
        landmark_token_id: Token inserted after every chunk.
        offload_chunk_memory: Let ``generate`` keep chunk keys and values in host memory.
        gca_implementation: Kernel of grouped cross attention.
    """

    model_type = "drt"

    chunk_num_key_value_heads: int | None = None
    num_lower_layers: int = 6
    layers_per_group: Sequence[int] = (6,)
    num_encoder_layers: int = 2
    chunk_size: int = 63
    chunk_top_k: int = 8
    softmax_off_by_one: bool = True
    retrieval_noise: Literal["gumbel"] | None = "gumbel"
    query_norm_eps: float = 1e-5
    encoder_rms_norm_eps: float = 1e-6
    encoder_rope_theta: float = 10000.0
    landmark_token_id: int = 50264
    offload_chunk_memory: bool = False
    gca_implementation: GCAImplementation = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive and check all fields."""
        self.layers_per_group = list(self.layers_per_group)
        self.chunk_num_key_value_heads = self.chunk_num_kv_heads
        self._check_sizes()
        self.num_hidden_layers = self.num_lower_layers + sum(self.layers_per_group)
        if kwargs.pop("num_hidden_layers", self.num_hidden_layers) != self.num_hidden_layers:
            raise ValueError("num_hidden_layers follows from num_lower_layers and layers_per_group, leave it out")
        super().__post_init__(**kwargs)
        self._check_parts()

    @property
    def chunk_num_kv_heads(self) -> int:
        """Key/value heads of the chunk memory."""
        return self.num_kv_heads if self.chunk_num_key_value_heads is None else self.chunk_num_key_value_heads

    def _check_sizes(self) -> None:
        sizes = ("chunk_num_key_value_heads", "num_lower_layers", "num_encoder_layers", "chunk_size", "chunk_top_k")
        check_positive({name: getattr(self, name) for name in sizes})
        if not self.layers_per_group:
            raise ValueError("layers_per_group must name at least one group of upper layers, got an empty list")
        check_positive({f"layers_per_group[{i}]": layers for i, layers in enumerate(self.layers_per_group)})

    def _check_parts(self) -> None:
        kv_heads = {"chunk_num_key_value_heads": self.chunk_num_kv_heads}
        check_heads(self.hidden_size, self.num_attention_heads, kv_heads)
        self.check_rotary()
        self.check_landmark(self.landmark_token_id)
        check_choice("retrieval_noise", self.retrieval_noise, Literal["gumbel", None])
        check_choice("gca_implementation", self.gca_implementation, GCAImplementation)

    @classmethod
    def from_reference_config(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        """Translate a published configuration.

        Args:
            mapping: The published keys and values; keys that never had an effect are ignored.
            **overrides: Fields of this class that replace the translated ones.

        Raises:
            ValueError: If ALiBi is switched off, or a field is out of range.
        """
        fields = published_fields(mapping, _RENAMES, ignored=frozenset({"num_hidden_layers", "decoder_layers"}))
        if "num_attention_heads" in fields:
            fields["chunk_num_key_value_heads"] = fields["num_attention_heads"]
        if mapping.get("decoder_layers"):
            fields["num_lower_layers"], *fields["layers_per_group"] = mapping["decoder_layers"]
        chunk_size = fields.get("chunk_size", 63)
        fields["softmax_off_by_one"] = (chunk_size + 1) % _PUBLISHED_TILE == 0
        return cls(**{**fields, **overrides})
