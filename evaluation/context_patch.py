"""What commands ask of an inference-time method over a context: the one interface behind ``patch=NAME``.

A further method is a class with these functions in ``patches/`` and a file in ``recipes/patch/`` that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Generated(Protocol):
    """Generated tokens of a batch."""

    token_ids: list[list[int]]
    """Of each row, up to and including an end token."""


class BoundPatch(Protocol):
    """A method bound to a model; `patches.parallel_context.engine.BoundContext` is one."""

    def encode(self, pieces: Any, *, query_ids: Any = None) -> Any:
        """Read the pieces of a context; the state that comes back serves many queries."""

    def generate(self, state: Any, query_ids: Any, *, max_new_tokens: int, **options: Any) -> Generated:
        """Continue a query behind a context; ``do_sample``, ``temperature``, ``top_p``, ``seed`` among the options."""


class ContextPatch(Protocol):
    """Options of a method; `patches.parallel_context.ParallelContext` is one."""

    def split_documents(self, documents: Sequence[Sequence[int]]) -> list[list[int]]:
        """Make pieces of documents, each a list of token ids."""

    def prefix_ids(self, tokenizer: Any, config: Any) -> list[int]:
        """Return the tokens that the method puts in front of a context by itself; ``config`` is the text model's."""

    def num_positions(self, pieces: Sequence[Sequence[int]], *, prefix: int, query: int) -> int:
        """Return how many positions a query of so many tokens reaches behind pieces and prefix."""

    def bind(self, model: Any, tokenizer: Any = None) -> AbstractContextManager[Any]:
        """Bind to a model for the length of a ``with`` block, which yields a `BoundPatch`."""


def check_fit(
    patch: ContextPatch, pieces: Sequence[Sequence[int]], *, prefix: int, query: int, limit: int | None
) -> None:
    """Refuse a context that reaches beyond what a model was made for.

    Args:
        patch: how it is read.
        pieces: its pieces.
        prefix: tokens in front of every piece.
        query: tokens that are read and generated behind them.
        limit: positions of the model; None: as many as are wanted.

    Raises:
        ValueError: a piece, or the query behind the pieces, does not fit.
    """
    check_pieces(pieces, prefix=prefix, limit=limit, where="the context")
    used = patch.num_positions(pieces, prefix=prefix, query=query)
    if limit is not None and used > limit:
        raise ValueError(
            f"prompt and new tokens reach position {used} behind pieces of up to {max(map(len, pieces))} tokens, but "
            f"the model takes {limit}: shorten them, or cut the documents shorter with patch.max_piece_tokens=N"
        )


def check_pieces(pieces: Sequence[Sequence[int]], *, prefix: int, limit: int | None, where: str) -> None:
    """Refuse pieces that are longer than what a model was made for.

    Raises:
        ValueError: a piece does not fit, with ``where`` in front.
    """
    longest = max(map(len, pieces), default=0)
    if limit is not None and prefix + longest > limit:
        raise ValueError(
            f"{where} has a piece of {longest} tokens behind a prefix of {prefix}, but the model takes {limit}: cut it "
            "into more pieces (a greater degree, or patch.max_piece_tokens=N)"
        )
