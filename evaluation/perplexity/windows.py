"""Scoring windows of a token stream: one forward each, or segments through the model's cache.

Notable: a window longer than a segment is fed piece by piece, so memory follows the segment and the cache, not the
window, and logits exist only where a target is scored.

B batch, T tokens of a window (the BOS included), V vocabulary, R scored positions of a window (its last ones).
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.perplexity.reading import Window, shape_of
from evaluation.scoring import TokenStream
from losses.cross_entropy import IGNORE_INDEX, next_token_nll

Report = Callable[[int], None]
"""Called with the number of input tokens just read."""


def score_windows(
    model: Any,
    stream: TokenStream,
    batch: list[Window],
    *,
    bos_token_id: int | None = None,
    segment_length: int | None = None,
    report: Report = lambda tokens: None,
) -> tuple[Tensor, int]:
    """Return losses ``[B, R]`` float32 of the targets of equal windows, and T, the inputs per window.

    Args:
        model: in evaluation mode, without gradients.
        stream: the tokens.
        batch: windows of one shape.
        bos_token_id: put before every window.
        segment_length: longer windows go through the model's cache in pieces of so many tokens; None: never.
        report: told about every piece.
    """
    rows = torch.from_numpy(np.stack([stream.read(start, stop + 1) for start, stop, _ in batch]))
    if bos_token_id is not None:
        rows = torch.cat([rows.new_full((len(batch), 1), bos_token_id), rows], dim=1)
    _check_vocabulary(model, rows)
    length, num_scored = rows.shape[1] - 1, shape_of(batch[0])[1]
    named = inspect.signature(model.forward).parameters
    whole = segment_length is None or length <= segment_length or not _continues(model)
    size = length if whole or segment_length is None else segment_length
    losses, cache = [], None
    for start in range(0, length, size):
        stop = min(start + size, length)
        scored = min(stop - start, max(0, stop - (length - num_scored)))
        # Where nothing is scored, one row of logits is the fewest a model returns.
        options = {"use_cache": not whole, "logits_to_keep": max(1, scored), "past_key_values": cache}
        options = {name: value for name, value in options.items() if name in named and value is not None}
        output = model(input_ids=rows[:, start:stop].to(_device(model)), **options)
        if scored:
            logits = (output if isinstance(output, Tensor) else output.logits)[:, -scored:]
            losses.append(_last_nll(logits, rows[:, stop - scored + 1 : stop + 1]))
        cache = None if whole else output.past_key_values
        report((stop - start) * len(batch))
    return torch.cat(losses, dim=1), length


def _last_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses ``[B, R]`` of logits ``[B, R, V]`` against the tokens that follow them ``[B, R]``."""
    targets = targets.to(logits.device)
    # labels[:, t + 1] is the target at t; the column before the first target is never one.
    labels = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=IGNORE_INDEX)
    return next_token_nll(logits, labels, next_token=targets[:, -1])[0]


def _continues(model: Any) -> bool:
    """Whether a model reads on from a cache."""
    return {"past_key_values", "use_cache"} <= inspect.signature(model.forward).parameters.keys()


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _check_vocabulary(model: Any, rows: Tensor) -> None:
    size, largest = getattr(getattr(model, "config", None), "vocab_size", None), int(rows.max())
    if size is not None and largest >= size:
        raise ValueError(
            f"the text holds token id {largest}, but the model's vocabulary ends at {size - 1}; "
            "score with the tokens of the model's own tokenizer"
        )
