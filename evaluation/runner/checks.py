"""Contexts that are too long for a model, and options of a patch that had nothing to do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.loading import max_positions
from evaluation.runner.prompts import Prompt
from patches.parallel_context import ParallelContext


def acts_while_decoding(patch: ParallelContext) -> bool:
    """Whether generated tokens see another context than the query did."""
    eviction, calibration = patch.eviction, patch.calibration
    evicts = eviction is not None and eviction.stage == "query" and eviction.method != "streaming"
    return evicts or (calibration is not None and calibration.apply == "cache")


@dataclass(frozen=True)
class Shape:
    """Tokens of a prompt."""

    pieces: int
    longest_piece: int
    context: int
    whole: int

    @classmethod
    def of(cls, prompt: Prompt) -> Shape:
        """Measure a prompt."""
        longest = max(map(len, prompt.pieces), default=0)
        return cls(len(prompt.pieces), longest, prompt.num_context_tokens, len(prompt.tokens))


def tell(name: str, model: Any, patch: ParallelContext | None, shapes: Sequence[Shape]) -> None:
    """Warn of contexts too long for the model, and of those too short for what a patch is to do, once each."""
    limit = max_positions(model.config)
    beyond = [shape.whole for shape in shapes if limit is not None and shape.pieces <= 1 and shape.whole > limit]
    sentences = []
    if beyond:
        sentences.append(
            f"{len(beyond)} of {len(shapes)} prompts, up to {max(beyond)} tokens, are beyond the {limit} "
            "that the model was made for"
        )
    if patch is not None:
        sentences += _idle(patch, shapes)
    for sentence in sentences:
        warnings.warn(f"{name}: {sentence}", stacklevel=5)


def _idle(patch: ParallelContext, shapes: Sequence[Shape]) -> list[str]:
    sentences = []
    single = sum(shape.pieces <= 1 for shape in shapes)
    if single and patch.degree != 1 and (patch.degree or patch.max_piece_tokens):
        sentences.append(f"{single} of {len(shapes)} contexts are no longer than one piece: plain attention there")
    eviction = patch.eviction
    if eviction is not None and eviction.method != "streaming":
        kind = "piece" if eviction.stage == "piece" else "context"
        longest = max(shape.longest_piece if kind == "piece" else shape.context for shape in shapes)
        if eviction.capacity >= longest:
            sentences.append(
                f"capacity {eviction.capacity} is not below the longest {kind} of {longest} tokens: nothing is evicted"
            )
    return sentences
