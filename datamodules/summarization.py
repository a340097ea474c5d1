"""How a document and its summary become one row: ``[padding] document |Summary: summary <eos>``.

Notable: the colon opens a chunk, so that the landmark before it has seen nearly all of the prompt and everything
generated reads what it retrieved. The document is cut where something must be; marker and target never are.

Letters: T tokens of a row, S tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from datamodules.batch import IGNORED

Int64Array = npt.NDArray[np.int64]
Alignment = Literal["pad", "trim", "none"]
LossOn = Literal["all", "summary"]
MARKER = ("|Summary", ":")
"""Texts of the marker, each turned into tokens by itself."""


@dataclass(frozen=True)
class SummaryLayout:
    """The options of a row.

    Attributes:
        marker: tokens between document and summary.
        max_length: T, tokens of a row.
        max_summary_length: tokens of a summary with its end-of-text token; of a longer one the first are kept.
        chunk_size: S; None without chunks.
        alignment: how the last token of the marker comes to open a chunk: ``pad`` puts visible padding in front,
            ``trim`` drops leading tokens of the document (or pads where it is too short), ``none`` does nothing.
        pad_token_id: padding in front and behind.
        eos_token_id: ends the summary.
        loss_on: ``all`` scores the whole row (published), ``summary`` the summary and its end.

    Raises:
        ValueError: sizes that leave no room, an unknown choice, or an alignment without chunks.
    """

    marker: tuple[int, ...]
    max_length: int
    max_summary_length: int
    chunk_size: int | None = None
    alignment: Alignment = "pad"
    pad_token_id: int = 50257
    eos_token_id: int = 50256
    loss_on: LossOn = "all"

    def __post_init__(self) -> None:
        for name, choices in (("alignment", Alignment), ("loss_on", LossOn)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.max_summary_length < 1 or (self.chunk_size is not None and self.chunk_size < 1):
            raise ValueError(
                f"max_summary_length and chunk_size must be at least 1, got {self.max_summary_length} and "
                f"{self.chunk_size}"
            )
        if self.alignment != "none" and self.chunk_size is None:
            raise ValueError(f"alignment={self.alignment} needs the chunk_size of the model; without one pass none")
        self.prompt_room(self.max_summary_length)

    def prompt_room(self, target_length: int) -> int:
        """Return how many tokens a prompt may have beside a target of so many tokens.

        Raises:
            ValueError: a marker at its place does not fit.
        """
        room = self.max_length - target_length
        size = 1 if self.alignment == "none" or self.chunk_size is None else self.chunk_size
        needed = len(self.marker) + (1 - len(self.marker)) % size
        if room < needed:
            raise ValueError(
                f"a row of {self.max_length} tokens leaves {room} for the prompt beside a summary of {target_length}, "
                f"and the marker alone needs {needed}: use longer rows or shorter summaries"
            )
        return room

    def target_length(self, summary_length: int) -> int:
        """Return the tokens of a target, end included, for a summary of so many tokens."""
        return min(summary_length + 1, self.max_summary_length)

    def cut(self, document_length: int, room: int) -> tuple[int, int, int]:
        """Return where the kept part of a document starts and stops, and the padding in front of it."""
        marker, stop = len(self.marker), min(document_length, room - len(self.marker))
        if self.alignment == "none" or self.chunk_size is None:
            return 0, stop, 0
        excess = (stop + marker - 1) % self.chunk_size
        if self.alignment == "trim" and excess <= stop:
            return excess, stop, 0
        pads = -excess % self.chunk_size
        if stop + marker + pads > room:
            # The largest length that fits and is 1 mod S.
            return 0, room - (room - 1) % self.chunk_size - marker, 0
        return 0, stop, pads

    def prompt(self, document: Sequence[int] | Int64Array, room: int) -> Int64Array:
        """Return the prompt of a document, int64 ``[P]``: at most ``room`` tokens, padding in front included."""
        start, stop, pads = self.cut(len(document), room)
        front = np.full(pads, self.pad_token_id, np.int64)
        kept = np.asarray(document[start:stop], np.int64)
        return np.concatenate([front, kept, np.asarray(self.marker, np.int64)])

    def row(self, document: Sequence[int] | Int64Array, summary: Sequence[int] | Int64Array) -> dict[str, Any]:
        """Return ``input_ids``, ``labels``, ``attention_mask`` int64 [T] and ``prompt_length``, front padding included.

        Labels are not shifted, -100 at padding; the padding in front is visible (mask 1), that behind is not.
        """
        size = self.target_length(len(summary))
        target = np.append(np.asarray(summary[: size - 1], np.int64), self.eos_token_id)
        room = self.prompt_room(size)
        prompt = self.prompt(document, room)
        pads = self.cut(len(document), room)[2]
        stop = len(prompt) + size
        input_ids = np.full(self.max_length, self.pad_token_id, np.int64)
        input_ids[:stop] = np.concatenate([prompt, target])
        place = np.arange(self.max_length)
        first = pads if self.loss_on == "all" else len(prompt)
        return {
            "input_ids": input_ids,
            "labels": np.where((place >= first) & (place < stop), input_ids, IGNORED),
            "attention_mask": (place < stop).astype(np.int64),
            "prompt_length": len(prompt),
        }

    def num_targets(self, document_length: int, summary_length: int) -> int:
        """Return how many targets `row` has for a document and a summary of so many tokens.

        A target needs a token before it: the first token of a row is none.
        """
        size = self.target_length(summary_length)
        if self.loss_on == "summary":
            return size
        start, stop, pads = self.cut(document_length, self.prompt_room(size))
        return stop - start + len(self.marker) + size - (pads == 0)


def format_summarization(
    document: Sequence[int] | Int64Array,
    summary: Sequence[int] | Int64Array,
    *,
    marker: Sequence[int],
    max_length: int,
    max_summary_length: int,
    chunk_size: int | None = None,
    alignment: Alignment = "pad",
    pad_token_id: int = 50257,
    eos_token_id: int = 50256,
    loss_on: LossOn = "all",
) -> dict[str, Any]:
    """Lay out one document and its summary.

    Args:
        document: token ids.
        summary: token ids, without an end.
        marker: see `SummaryLayout`, as the rest.
        max_length: T.
        max_summary_length: with the end.
        chunk_size: S.
        alignment: ``pad``, ``trim`` or ``none``.
        pad_token_id: padding.
        eos_token_id: end of the summary.
        loss_on: ``all`` or ``summary``.

    Returns:
        ``[T]`` each, see `SummaryLayout.row`.

    Raises:
        ValueError: see `SummaryLayout`.
    """
    layout = SummaryLayout(
        tuple(marker),
        max_length,
        max_summary_length,
        chunk_size=chunk_size,
        alignment=alignment,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        loss_on=loss_on,
    )
    return layout.row(document, summary)
