"""Configuration of the sliding-window language model; the defaults are the published baseline with 12 layers."""

from collections.abc import Mapping
from typing import Any, Self

from models.checks import check_positive
from models.window_config import WindowConfig, published_fields

# Options of the retrieval model, which shares its published config files with this one.
_OF_RETRIEVAL = frozenset({"chunk_id", "enc_chunk_size", "chunk_topk", "encoder_layers"})
_HANDLED = frozenset({"decoder_layers", "num_hidden_layers"})


class SlidingWindowLMConfig(WindowConfig):
    """Sizes and options of a sliding-window language model.

    Attributes:
        num_hidden_layers: Blocks.
    """

    model_type = "sliding_window_lm"

    num_hidden_layers: int = 12

    def __post_init__(self, **kwargs: Any) -> None:
        """Check all fields."""
        check_positive({"num_hidden_layers": self.num_hidden_layers})
        super().__post_init__(**kwargs)

    @classmethod
    def from_reference_config(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        """Translate a published configuration.

        Args:
            mapping: The published keys and values; keys of the retrieval model and dead keys are ignored.
            **overrides: Fields of this class that replace the translated ones.

        Raises:
            ValueError: If ALiBi is switched off, or a field is out of range.
        """
        fields = published_fields(mapping, {}, ignored=_OF_RETRIEVAL | _HANDLED)
        layers = mapping.get("num_hidden_layers", -1)
        if layers != -1:
            fields["num_hidden_layers"] = layers
        elif mapping.get("decoder_layers"):
            fields["num_hidden_layers"] = sum(mapping["decoder_layers"])
        return cls(**{**fields, **overrides})
