"""Parallel context encoding as one object: its options, how it splits a context, and how it binds to a model."""

import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patches.parallel_context.calibration import Calibration
from patches.parallel_context.checks import check_choice, check_count, check_flag
from patches.parallel_context.dispatch import IMPLEMENTATIONS, Implementation
from patches.parallel_context.eviction import TokenEviction
from patches.parallel_context.options import APE, KeepPieces, SelectiveAttention
from patches.parallel_context.positions import check_mode, next_position
from patches.parallel_context.prefixes import prefix_token_ids
from patches.parallel_context.problem import MEGABYTE
from patches.parallel_context.splitting import SPLITS, SplitBy, split_context, token_list

if TYPE_CHECKING:
    from patches.parallel_context.engine import BoundContext


@dataclass(frozen=True)
class ParallelContext:
    """Options of parallel context encoding; they hold for every call.

    A sequence is prefix, pieces, query. Pieces see the prefix and themselves; the query sees everything.
    """

    degree: int | None = None
    """Pieces that `split` makes."""
    position_mode: str = "ME"
    prefix: str | None = "bos"
    """None, "bos", "p1", "p1_task", "p2" (published texts), or any other text."""
    selection: SelectiveAttention | None = None
    piece_policy: KeepPieces | None = None
    eviction: TokenEviction | None = None
    calibration: Calibration | None = None
    ape: APE | None = None
    micro_batch_tokens: int = 16384
    """Padded tokens of a forward pass over pieces."""
    max_piece_tokens: int | None = None
    """Longest piece that `split` makes by tokens: degree = ceil(n / max_piece_tokens)."""
    split_by: SplitBy = "tokens"
    overlap: int = 0
    """Tokens that pieces made by `split` share."""
    prefix_bos: bool = True
    """Whether text prefixes get a BOS in front."""
    prefix_repeat: int = 1
    fractional_positions: bool = False
    implementation: Implementation = "auto"
    workspace_mb: int = 256
    """Bound of any temporary of the attention calls."""

    def __post_init__(self) -> None:
        check_mode(self.position_mode)
        if self.degree is not None:
            check_count("degree", self.degree)
        if self.max_piece_tokens is not None:
            check_count("max_piece_tokens", self.max_piece_tokens)
            if self.degree is not None:
                raise ValueError("degree and max_piece_tokens both set the number of pieces; give one of them")
        for name in ("micro_batch_tokens", "prefix_repeat", "workspace_mb"):
            check_count(name, getattr(self, name))
        check_count("overlap", self.overlap, 0)
        check_choice("split_by", self.split_by, SPLITS)
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        check_flag("prefix_bos", self.prefix_bos)
        check_flag("fractional_positions", self.fractional_positions)
        if self.prefix is not None and not isinstance(self.prefix, str):
            raise ValueError(f"prefix must be None or a text, got {self.prefix!r}; token ids go to encode(prefix=...)")
        self._check_policies()
        self._warn_without_effect()

    def _check_policies(self) -> None:
        kinds = {
            "selection": SelectiveAttention,
            "piece_policy": KeepPieces,
            "eviction": TokenEviction,
            "calibration": Calibration,
            "ape": APE,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} must be None or a {kind.__name__}, got {value!r}")
        if self.ape is not None and self.selection is not None and self.selection.soft_temperature is not None:
            raise ValueError("APE and soft selection both reweigh the pieces; choose one")
        if self.overlap and self.split_by != "tokens":
            raise ValueError(f"overlap needs split_by='tokens', got {self.split_by!r}")
        if self.eviction is not None and self.eviction.method == "streaming" and (self.degree or 1) > 1:
            raise ValueError(f"streaming is a baseline for one piece, got degree={self.degree}; set degree=1")
        if self.eviction is not None and self.eviction.method == "streaming":
            others = [name for name in ("calibration", "piece_policy") if getattr(self, name) is not None]
            if others:
                raise ValueError(f"streaming holds sinks and a window, nothing is left to {others[0]}; leave it out")

    def _warn_without_effect(self) -> None:
        idle = []
        if self.prefix in (None, "bos") and not self.prefix_bos:
            idle.append("prefix_bos=False (the prefix is no text)")
        if self.prefix is None and self.prefix_repeat > 1:
            idle.append("prefix_repeat (there is no prefix)")
        selection = self.selection
        if self.degree == 1 and selection is not None:
            idle.append("selection (there is one piece)")
        elif self.degree and selection is not None and selection.top_k and selection.keeps_all(self.degree):
            idle.append(f"selection (it keeps {selection.top_k} of {self.degree} pieces)")
        if self.degree is not None and self.piece_policy is not None and self.piece_policy.keep >= self.degree:
            idle.append(f"piece_policy (it keeps {self.piece_policy.keep} of {self.degree} pieces)")
        for option in idle:
            warnings.warn(f"this option has no effect: {option}", stacklevel=4)

    @property
    def workspace(self) -> int:
        """Bytes of `workspace_mb`."""
        return self.workspace_mb * MEGABYTE

    def split(
        self, tokens: Any, *, separators: Sequence[Collection[int]] | None = None, joiner: Iterable[int] = ()
    ) -> list[list[int]]:
        """Cut a context by `degree` or `max_piece_tokens`, `split_by` and `overlap`.

        Args:
            tokens: Token ids (a list of passages with ``split_by="passages"``).
            separators: For ``split_by="separator"``.
            joiner: For ``split_by="passages"``.
        """
        degree = self.degree
        if degree is None:
            if self.max_piece_tokens is None:
                raise ValueError("split needs the number of pieces: set degree or max_piece_tokens")
            lists = tokens if self.split_by == "passages" else [tokens]
            degree = max(1, -(-sum(len(token_list(part)) for part in lists) // self.max_piece_tokens))
        return split_context(
            tokens, degree, by=self.split_by, overlap=self.overlap, separators=separators, joiner=joiner
        )

    def split_documents(self, documents: Sequence[Sequence[int]]) -> list[list[int]]:
        """Make pieces of documents, each a list of token ids; documents without a token are left out.

        Without `degree` and `max_piece_tokens` each is a piece. By passages, whole documents are dealt to the pieces;
        by tokens, `degree` cuts all documents as one text, and `max_piece_tokens` each of them by itself.

        Raises:
            ValueError: If there are fewer tokens than pieces.
        """
        texts = [token_list(document) for document in documents if len(document)]
        if self.degree is None and self.max_piece_tokens is None:
            return texts
        if self.split_by == "passages":
            return self.split(texts)
        if self.degree is not None:
            joint = [token for text in texts for token in text]
            if self.degree > len(joint):
                raise ValueError(f"degree asks for {self.degree} pieces of {len(joint)} tokens: lower it")
            return self.split(joint)
        return [piece for text in texts for piece in self.split(text)]

    def prefix_ids(self, tokenizer: Any, config: Any) -> list[int]:
        """Return the token ids of `prefix`; ``config`` is the text model's, for its BOS without a tokenizer."""
        return prefix_token_ids(
            self.prefix, bos=self.prefix_bos, repeat=self.prefix_repeat, tokenizer=tokenizer, config=config
        )

    def num_positions(self, pieces: Sequence[Sequence[int]], *, prefix: int, query: int) -> int:
        """Return how many positions a query of so many tokens reaches behind pieces and prefix."""
        return int(next_position([len(piece) for piece in pieces], self.position_mode, prefix)) + query

    def bind(self, model: Any, tokenizer: Any = None) -> "AbstractContextManager[BoundContext]":
        """Bind to a model for the length of a ``with`` block; the model is left exactly as found.

        Args:
            model: A Hugging Face causal language model of a supported family, adapters included.
            tokenizer: For text prefixes and generated text.

        Raises:
            ValueError: If the model is of no supported family, or an option cannot serve it.
        """
        from patches.parallel_context.engine import bind_context

        return bind_context(self, model, tokenizer)
