"""What a model cannot take, and which options of a patch had nothing to do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from evaluation.loading import has_position_table, max_positions
from evaluation.prompts import Prompt
from patches.parallel_context import ParallelContext


def check_fit(model: Any, patch: ParallelContext | None, prompts: Sequence[Prompt]) -> None:
    """Refuse windows that are longer than what a model was made for; warn of one long context.

    Raises:
        ValueError: a window of a split context, or any context of a model with a table of positions, does not fit.
    """
    limit = max_positions(model.config)
    if limit is None:
        return
    for prompt in prompts:
        longest = max(map(len, prompt.pieces), default=0) + len(prompt.prefix)
        if patch is not None and len(prompt.pieces) > 1 and longest > limit:
            raise ValueError(
                f"a window has {longest} tokens with its prefix, but the model was made for {limit}: "
                f"set max_piece_tokens below {limit - len(prompt.prefix)}, or a higher degree"
            )
        if len(prompt.tokens) > limit and len(prompt.pieces) <= 1:
            sentence = f"a prompt of {len(prompt.tokens)} tokens is beyond the {limit} the model was made for"
            if has_position_table(model.config):
                raise ValueError(f"{sentence}: pass max_context_tokens and truncation=middle")
            warnings.warn(f"{sentence}; its answers may be poor", stacklevel=4)


def tell_idle(name: str, patch: ParallelContext | None, prompts: Sequence[tuple[int, int, int]]) -> None:
    """Warn where contexts were too short for what a patch is to do.

    Args:
        name: what was asked.
        patch: how the contexts were read.
        prompts: of each the number of pieces, the tokens of the longest, the tokens of the context.
    """
    if patch is None or not prompts:
        return
    single = sum(count <= 1 for count, _, _ in prompts)
    if single and patch.degree != 1 and (patch.degree or patch.max_piece_tokens):
        warnings.warn(
            f"{name}: {single} of {len(prompts)} contexts are no longer than one piece: plain attention there",
            stacklevel=4,
        )
    eviction = patch.eviction
    if eviction is None or eviction.method == "streaming":
        return
    by_piece = eviction.stage == "piece"
    longest = max(piece if by_piece else context for _, piece, context in prompts)
    if eviction.capacity >= longest:
        warnings.warn(
            f"{name}: capacity {eviction.capacity} is not below the longest {'piece' if by_piece else 'context'} of "
            f"{longest} tokens: nothing is evicted",
            stacklevel=4,
        )
