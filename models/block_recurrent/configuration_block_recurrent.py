"""Configuration of the block-recurrent transformer."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from models.checks import check_positive
from models.window_config import DecoderConfig, published_fields

_RENAMES = {"num_hidden_layers": "num_hidden_layers"}
# Options of the retrieval model, which shares its published config files with this one.
_IGNORED = frozenset({"chunk_id", "enc_chunk_size", "chunk_topk", "encoder_layers", "decoder_layers"})


class BlockRecurrentConfig(DecoderConfig):
    """Sizes and options of a block-recurrent transformer.

    Attributes:
        num_hidden_layers: Layers, recurrent ones included.
        recurrent_layers: Which of them are recurrent, counted from 1.
        block_width: Tokens of a block; a token sees as many earlier positions.
        num_state_vectors: State vectors of a recurrent layer; None = block_width.
        segment_blocks: Blocks between which gradients flow in training.
        memory_dropout: Probability in training that a segment begins without memory and with the initial state.
        xpos_scale_base: Distance over which the xPos decay acts once.
    """

    model_type = "block_recurrent"

    num_key_value_heads: int | None = 1
    num_hidden_layers: int = 12
    recurrent_layers: Sequence[int] = (4,)
    block_width: int = 512
    num_state_vectors: int | None = None
    segment_blocks: int = 2
    memory_dropout: float = 0.1
    xpos_scale_base: int = 512

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive and check all fields."""
        self.recurrent_layers = sorted(self.recurrent_layers)
        self.num_state_vectors = self.num_states
        sizes = ("num_hidden_layers", "block_width", "num_state_vectors", "segment_blocks", "xpos_scale_base")
        check_positive({name: getattr(self, name) for name in sizes})
        layers = list(self.recurrent_layers)
        if len(set(layers)) != len(layers) or not all(1 <= layer <= self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"recurrent_layers must be different numbers from 1 to num_hidden_layers = {self.num_hidden_layers}, "
                f"got {layers}"
            )
        if not 0 <= self.memory_dropout < 1:
            raise ValueError(f"memory_dropout must lie in [0, 1), got {self.memory_dropout}")
        super().__post_init__(**kwargs)
        self.check_rotary()

    @property
    def num_states(self) -> int:
        """State vectors of a recurrent layer."""
        return self.block_width if self.num_state_vectors is None else self.num_state_vectors

    @classmethod
    def from_reference_config(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        """Translate a published configuration of the models this one is compared with.

        Args:
            mapping: The published keys and values; keys of the other models and dead keys are ignored.
            **overrides: Fields of this class that replace the translated ones.

        Raises:
            ValueError: If a field is out of range.
        """
        own = {key: value for key, value in mapping.items() if key not in ("enable_alibi", "num_key_value_heads")}
        if own.get("num_hidden_layers", -1) == -1:
            own["num_hidden_layers"] = sum(mapping["decoder_layers"]) if mapping.get("decoder_layers") else None
        fields = published_fields(own, _RENAMES, ignored=_IGNORED)
        window = fields.pop("window_size", None)
        if window is not None:
            fields["block_width"] = window - 1
        return cls(**{**fields, **overrides})
