"""Configuration of the language model with a frozen retriever."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from models.checks import check_choice, check_positive
from models.window_config import WindowConfig, published_fields

RetrieverName = Literal["bm25", "dense", "random"]
_RENAMES = {"encoder_layers": "num_encoder_layers", "enc_chunk_size": "chunk_size", "chunk_topk": "chunk_top_k"}
_IGNORED = frozenset({"chunk_id", "num_hidden_layers", "decoder_layers"})


class RPTConfig(WindowConfig):
    """Sizes and options of a language model that reads the neighbours a frozen retriever finds.

    Attributes:
        num_lower_layers: Blocks below the chunk memory.
        num_upper_layers: Blocks with chunked cross attention.
        num_encoder_layers: Bidirectional blocks over each chunk.
        chunk_size: Tokens of a chunk.
        chunk_top_k: Neighbours of a chunk.
        encoder_rms_norm_eps: Epsilon of the norms of the chunk encoder.
        retriever: "bm25" needs no weights, "dense" is a frozen text encoder, "random" draws.
        retriever_encoder: Folder or name of the encoder of "dense".
        retriever_tokenizer: Folder or name of this model's tokenizer, through which chunks become text for the
            encoder; None: the encoder reads this model's token ids.
        retriever_seed: Seed of "random".
    """

    model_type = "rpt"

    num_lower_layers: int = 6
    num_upper_layers: int = 6
    num_encoder_layers: int = 2
    chunk_size: int = 64
    chunk_top_k: int = 8
    encoder_rms_norm_eps: float = 1e-6
    retriever: RetrieverName = "bm25"
    retriever_encoder: str | None = None
    retriever_tokenizer: str | None = None
    retriever_seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive and check all fields."""
        sizes = ("num_lower_layers", "num_upper_layers", "num_encoder_layers", "chunk_size", "chunk_top_k")
        check_positive({name: getattr(self, name) for name in sizes})
        self.num_hidden_layers = self.num_lower_layers + self.num_upper_layers
        if kwargs.pop("num_hidden_layers", self.num_hidden_layers) != self.num_hidden_layers:
            raise ValueError("num_hidden_layers follows from num_lower_layers and num_upper_layers, leave it out")
        super().__post_init__(**kwargs)
        self.check_rotary()
        self._check_retriever()

    def _check_retriever(self) -> None:
        check_choice("retriever", self.retriever, RetrieverName)
        if self.retriever == "dense" and self.retriever_encoder is None:
            raise ValueError("retriever='dense' needs retriever_encoder, the folder or name of a text encoder")
        if self.retriever != "dense" and (self.retriever_encoder or self.retriever_tokenizer):
            raise ValueError(
                f"retriever_encoder and retriever_tokenizer have no effect with retriever={self.retriever!r}, "
                "set retriever='dense' or leave them out"
            )
        if self.retriever != "random" and self.retriever_seed:
            raise ValueError(f"retriever_seed has no effect with retriever={self.retriever!r}, leave it out")

    @property
    def chunks_in_window(self) -> int:
        """Latest chunks that the window attention covers; they are not retrieved."""
        return -(-self.window_size // self.chunk_size)

    @classmethod
    def from_reference_config(cls, mapping: Mapping[str, Any], **overrides: Any) -> Self:
        """Translate a published configuration of the models this one is compared with.

        Args:
            mapping: The published keys and values; keys that never had an effect are ignored.
            **overrides: Fields of this class that replace the translated ones.

        Raises:
            ValueError: If ALiBi is switched off, or a field is out of range.
        """
        fields = published_fields(mapping, _RENAMES, ignored=_IGNORED)
        if mapping.get("decoder_layers"):
            lower, *upper = mapping["decoder_layers"]
            fields |= {"num_lower_layers": lower, "num_upper_layers": sum(upper)}
        return cls(**{**fields, **overrides})
