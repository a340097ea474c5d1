"""Where training windows and validation windows lie; pure functions of plain numbers.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class WindowRow(NamedTuple):
    """Consecutive validation windows of equal length that form one batch.

    Attributes:
        first: number of the first window.
        start: corpus position of its first token; the others follow without a gap.
        length: tokens of each window.
        windows: number of windows.
    """

    first: int
    start: int
    length: int
    windows: int


def window_start(seed: int, step: int, index: int, *, num_tokens: int, length: int) -> int:
    """Draw the corpus position of a training window.

    ``default_rng([seed, step, index]).integers(num_tokens - length + 1)``: nothing but the arguments enters, so
    the data of any step can be had again at any time, by any number of workers and ranks.

    Args:
        seed: seed of the run.
        step: optimiser step.
        index: number of the sample inside the optimiser step, over all ranks and accumulated micro-batches.
        num_tokens: tokens of the corpus.
        length: tokens of the window.

    Raises:
        ValueError: the corpus is shorter than the window.
    """
    if not 1 <= length <= num_tokens:
        raise ValueError(f"a window of {length} tokens does not fit a corpus of {num_tokens}: use a shorter context")
    return int(np.random.default_rng([seed, step, index]).integers(num_tokens - length + 1))


def validation_rows(num_tokens: int, *, length: int, batch_size: int) -> list[WindowRow]:
    """Cut tokens ``0 .. num_tokens - 1`` into windows without overlap, and windows into batches.

    A window [start, start + length) predicts the tokens start + 1 .. start + length, so the windows cover the inputs
    0 .. num_tokens - 2 and every target 1 .. num_tokens - 1 once. The shorter last window is a batch of its own.

    Raises:
        ValueError: not even one whole window, or nothing to predict.
    """
    inputs = num_tokens - 1
    if length < 1 or inputs < length:
        raise ValueError(
            f"an evaluation length of {length} needs {length + 1} tokens, the validation range has {num_tokens}: "
            "use shorter eval_lengths, a larger max_eval_tokens or more validation text"
        )
    whole, rest = divmod(inputs, length)
    rows = [
        WindowRow(first, first * length, length, min(batch_size, whole - first))
        for first in range(0, whole, batch_size)
    ]
    return rows + ([WindowRow(whole, whole * length, rest, 1)] if rest else [])
