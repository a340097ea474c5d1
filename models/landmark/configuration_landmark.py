"""Configuration of the landmark-attention language model."""

from collections.abc import Mapping
from typing import Any, Self

from models.checks import check_positive
from models.window_config import DecoderConfig, published_fields

_RENAMES = {"chunk_id": "landmark_token_id", "mem_freq": "chunk_size", "rope_theta": "rope_theta"}
# Options of the retrieval model, which shares its published config files with this one.
_IGNORED = frozenset(
    {"enc_chunk_size", "chunk_topk", "encoder_layers", "decoder_layers", "num_hidden_layers", "slide_window"}
)


class LandmarkConfig(DecoderConfig):
    """Sizes and options of a landmark-attention language model; ``vocab_size`` includes the landmark.

    Attributes:
        num_hidden_layers: Blocks.
        chunk_size: Text tokens of a block, landmark excluded.
        chunk_top_k: Earlier blocks that a head reads for a token when there is a cache; None = all, as without one.
        landmark_token_id: Token inserted after every block.
        rope_theta: Base of the rotary positions.
    """

    model_type = "landmark"

    num_hidden_layers: int = 12
    chunk_size: int = 63
    chunk_top_k: int | None = 4
    landmark_token_id: int = 50264
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Check all fields."""
        check_positive({name: getattr(self, name) for name in ("num_hidden_layers", "chunk_size")})
        if self.chunk_top_k is not None:
            check_positive({"chunk_top_k": self.chunk_top_k})
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta}")
        super().__post_init__(**kwargs)
        self.check_rotary()
        self.check_landmark(self.landmark_token_id)

    @classmethod
    def from_reference_config(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        """Translate a published configuration.

        Args:
            mapping: The published keys and values; keys of the other models and dead keys are ignored.
            **overrides: Fields of this class that replace the translated ones.

        Raises:
            ValueError: If a field is out of range.
        """
        # The ALiBi switch is that of the other models: landmark attention has rotary positions.
        own = {key: value for key, value in mapping.items() if key not in ("enable_alibi", "slide_window")}
        fields = published_fields(own, _RENAMES, ignored=_IGNORED)
        layers = mapping.get("num_hidden_layers", -1)
        if layers != -1:
            fields["num_hidden_layers"] = layers
        elif mapping.get("decoder_layers"):
            fields["num_hidden_layers"] = sum(mapping["decoder_layers"])
        return cls(**{**fields, **overrides})
