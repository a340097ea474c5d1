"""What a sweep over parallel contexts computes: its options checked, its cells, the segments of the texts.

Notable: a selection that keeps every piece is no selection, so such cells share the numbers of the plain one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from evaluation.parallel_context.tails import TailCut
from patches.parallel_context import ParallelContext, SelectiveAttention

NONE = "none"
Segments = npt.NDArray[np.int64]
_TOP, _SOFT = re.compile(r"top(\d+)"), re.compile(r"soft(\d+(?:\.\d+)?)")


class Texts(Protocol):
    """Documents to score; `preprocess.scored_texts` has them from files, corpora and the hub."""

    name: str
    identity: str

    def documents(self, tokenizer: Any) -> Iterator[Sequence[int]]:
        """Yield the token ids of each document, without special tokens."""


class Setting(NamedTuple):
    """What one cell varies."""

    length: int
    degree: int
    prefix: str
    selection: str


@dataclass(frozen=True)
class SweepGrid:
    """What a sweep varies.

    Attributes:
        lengths: tokens of a segment, tail included and prefix not.
        degrees: numbers of pieces.
        prefixes: ``none``, ``bos``, ``p1``, ``p2`` or any other text.
        selections: ``none``, ``topN`` (the best N pieces) or ``softT`` (shares by score at temperature T).

    Raises:
        ValueError: a list that is empty, repeats itself or holds what is none of these.
    """

    lengths: Sequence[int] = (4096, 8192, 16384)
    degrees: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)
    prefixes: Sequence[str] = (NONE, "bos", "p1", "p2")
    selections: Sequence[str] = (NONE, "top1", "top2")

    def __post_init__(self) -> None:
        for name in ("lengths", "degrees", "prefixes", "selections"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different values, at least one, got {values}")
            if name in ("lengths", "degrees") and min(values) < 1:
                raise ValueError(f"{name} must be at least 1, got {values}")
        for name in self.selections:
            selection_of(name)

    def cells(self) -> list[Setting]:
        """Return the settings of all cells, length by length, degree by degree."""
        return [
            Setting(length, degree, prefix, selection)
            for length in self.lengths
            for degree in self.degrees
            for prefix in self.prefixes
            for selection in self.selections
        ]

    def check(self, cut: TailCut) -> None:
        """Refuse lengths without a context and degrees above the tokens of one; tell selections without effect.

        Raises:
            ValueError: with the length and the degree.
        """
        shortest = min(self.lengths) - cut.num_query_tokens
        if shortest < 1:
            raise ValueError(
                f"a length of {min(self.lengths)} has no context before its last {cut.num_query_tokens} tokens "
                f"(keep_tail={cut.keep_tail}, unsplit={cut.unsplit}): lower keep_tail or leave that length out"
            )
        if max(self.degrees) > shortest:
            raise ValueError(
                f"degree {max(self.degrees)} asks for more pieces than there are tokens: a length of "
                f"{min(self.lengths)} has a context of {shortest}; leave that degree or that length out"
            )
        for name in self.selections:
            selection = selection_of(name)
            idle = [degree for degree in self.degrees if selection is not None and selection.keeps_all(degree)]
            if idle:
                degrees = ", ".join(map(str, idle))
                warnings.warn(f"selection {name} has no effect at degree {degrees}: equal to none", stacklevel=2)


def selection_of(name: str) -> SelectiveAttention | None:
    """Return the selection of a name.

    Raises:
        ValueError: no such name.
    """
    if name == NONE:
        return None
    if (top := _TOP.fullmatch(name)) and int(top[1]):
        return SelectiveAttention(top_k=int(top[1]))
    if (soft := _SOFT.fullmatch(name)) and float(soft[1]):
        return SelectiveAttention(soft_temperature=float(soft[1]))
    raise ValueError(f"selections are none, topN or softT, as in top2 and soft0.5, got {name!r}")


def patch_of(setting: Setting, base: ParallelContext) -> ParallelContext:
    """Return a patch with the degree, prefix and selection of a cell; its other options are those of ``base``.

    ``topN`` and ``softT`` change that option of the selection of ``base`` where it has one.
    """
    chosen = selection_of(setting.selection)
    if chosen is not None and base.selection is not None:
        soft = chosen.soft_temperature
        chosen = replace(base.selection, top_k=chosen.top_k, soft_temperature=soft)
    if chosen is not None and chosen.keeps_all(setting.degree):
        chosen = None
    prefix = None if setting.prefix == NONE else setting.prefix
    return replace(base, degree=setting.degree, prefix=prefix, selection=chosen)


def described(patch: ParallelContext) -> dict[str, Any]:
    """Return the options of a patch that its numbers depend on, as plain values; the prefix is told by its tokens."""
    apart = ("workspace_mb", "prefix", "prefix_bos", "prefix_repeat")
    return {name: value for name, value in asdict(patch).items() if name not in apart}


def cut_segments(documents: Iterable[Sequence[int]], lengths: Sequence[int], max_documents: int) -> dict[int, Segments]:
    """Cut the first documents that are long enough into consecutive segments, the rest of each left out.

    Args:
        documents: token ids; read no further than needed.
        lengths: tokens of a segment.
        max_documents: documents for each length; shorter ones do not count.

    Returns:
        The segments of each length ``[n, length]``, in the order of the text.
    """
    segments: dict[int, list[Segments]] = {length: [np.empty((0, length), np.int64)] for length in lengths}
    taken = dict.fromkeys(lengths, 0)
    for document in documents:
        for length in lengths:
            if len(document) < length or taken[length] == max_documents:
                continue
            taken[length] += 1
            whole = len(document) // length * length
            segments[length].append(np.asarray(document[:whole], np.int64).reshape(-1, length))
        if all(count == max_documents for count in taken.values()):
            break
    return {length: np.concatenate(found) for length, found in segments.items()}


def attention_cost(pieces: Sequence[Sequence[int]], num_tokens: int) -> float:
    """Return the pairs of tokens that attend to each other in the pieces, as a share of those in the whole context."""
    return sum(len(piece) * (len(piece) + 1) for piece in pieces) / (num_tokens * (num_tokens + 1))
