"""Perplexity of a token stream: every target once, summed in float64, exponential at the very end.

Notable: what is scored depends on the stream alone, never on window, stride or model, so numbers of different
context lengths and models are comparable. A model is anything called as ``model(input_ids=...)`` that returns logits.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evaluation.gathering import gather
from evaluation.perplexity.journal import Collector, Journal, report
from evaluation.perplexity.windows import Window, score_windows, window_batches
from evaluation.processes import Process
from evaluation.scoring import Corpus, TokenStream, scoring_mode
from evaluation.token_progress import TokenProgress


def evaluation_windows(num_tokens: int, window: int, stride: int | None = None) -> list[Window]:
    """Cut a stream into (start, stop, first_target): inputs ``x[start:stop]``, targets ``first_target..stop``.

    Target t is predicted at t - 1. ``start`` is 0, stride, 2 stride, ...; ``stop = min(start + window, n - 1)``;
    ``first_target`` is one past the previous ``stop`` (the first: 1). Each target 1..n-1 appears exactly once.

    Args:
        num_tokens: n; fewer than 2 tokens have no target and give no window.
        window: inputs per window.
        stride: distance of the starts, at most ``window``; None is ``window`` (no overlap).

    Raises:
        ValueError: ``window`` is below 1 or ``stride`` not in 1..window.
    """
    stride = window if stride is None else stride
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 < stride <= window:
        raise ValueError(f"stride must lie between 1 and the window of {window}, got {stride}")
    windows: list[Window] = []
    start, stop = 0, 0
    while stop < num_tokens - 1:
        first_target = stop + 1
        stop = min(start + window, num_tokens - 1)
        windows.append((start, stop, first_target))
        start += stride
    return windows


def evaluate_perplexity(
    model: Any,
    tokens: Sequence[int] | np.ndarray | Tensor | Corpus,
    *,
    window: int,
    stride: int | None = None,
    bos_token_id: int | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    parity: Literal["published"] | None = None,
    max_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    segment_length: int | None = None,
    journal: Journal | None = None,
    process: Process | None = None,
) -> dict[str, Any]:
    """Score a stream: ``perplexity = exp(sum of NLL / number of targets)``.

    Args:
        model: a causal language model (suite or Hugging Face); it is scored in eval mode on the device where it
            stands, and its mode is put back.
        tokens: 1-D ids ``[n]`` or a token corpus.
        window: inputs per window, the BOS included.
        stride: distance of the windows' starts; None (or ``window``) means windows that do not overlap. With a BOS
            a window holds ``window - 1`` text tokens, and that is the largest stride in effect.
        bos_token_id: put before every window; then token 0 of the stream is a target, too.
        batch_size: windows per forward.
        max_windows: stop after so many windows.
        parity: ``"published"`` adds ``published_mean_loss``, the mean over non-overlapping windows of the windows'
            mean losses (nats), the first token of each window unscored; a shorter last window counts as much as the
            others. Published scripts print it under the name of perplexity, which it is not.
        max_tokens: score only the first so many tokens of the stream.
        dtype: autocast dtype; None computes in the model's own.
        progress: show a progress bar on the error stream.
        segment_length: windows longer than this go through the model's cache in pieces of so many tokens; None: one
            forward per window. A model without a cache reads every window in one forward.
        journal: where finished batches are kept for a later call with the same arguments to go on from.
        process: one of several that have joined (`evaluation.gathering`): each scores its share of the batches, and
            all return the same report. None: alone.

    Returns:
        ``nll_sum``, ``num_targets``, ``loss`` (nats per target), ``perplexity``, ``bits_per_byte``,
        ``position_edges``, ``position_nll_sum``, ``position_counts`` (see `evaluation.positions`), ``windows``
        (start, stop, first target, nll_sum of each) and the protocol: ``window``, ``stride``, ``bos_token_id``,
        ``num_tokens``, ``num_windows``, ``corpus`` (identity), ``dtype``.

    Raises:
        ValueError: sizes that cannot be scored, ids outside the model's vocabulary, or a parity with other windows.
    """
    counts = {"batch_size": batch_size, "max_windows": max_windows, "max_tokens": max_tokens}
    _check_request(parity, counts | {"segment_length": segment_length})
    stream = TokenStream.open(tokens, max_tokens)
    windows, stride = _plan(stream.num_tokens, window, stride, bos_token_id)
    if parity is not None and (bos_token_id is not None or stride != window):
        raise ValueError('parity="published" means windows that do not overlap and no BOS; leave both options out')
    batches = list(window_batches(windows[:max_windows], batch_size))
    done = {} if journal is None else journal.scores()
    process = process or Process()
    mine = [number for number in range(process.rank, len(batches), process.world_size) if number not in done]
    collector = Collector(window, parity is not None, journal)
    total = sum(stop - start for number in mine for start, stop, _ in batches[number])
    with scoring_mode(model, dtype), TokenProgress(f"scoring {window}", total, show=progress) as advance:
        for number in mine:
            scores = score_windows(
                model,
                stream,
                batches[number],
                bos_token_id=bos_token_id,
                segment_length=segment_length,
                report=advance,
            )
            collector.add(number, batches[number], *scores)
        collector.flush()
    scores_of_all = done | {number: score for part in gather(collector.done, process) for number, score in part.items()}
    return report(scores_of_all, window, bytes_per_token=stream.bytes_per_token) | {
        "window": window,
        "stride": stride,
        "bos_token_id": bos_token_id,
        "num_tokens": stream.num_tokens,
        "num_windows": sum(map(len, batches)),
        "segment_length": segment_length,
        "corpus": stream.identity,
        "dtype": str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
    }


def _plan(num_tokens: int, window: int, stride: int | None, bos_token_id: int | None) -> tuple[list[Window], int]:
    """Return the windows and the stride in effect; a BOS takes one place of every window."""
    if num_tokens < 2:
        raise ValueError(f"at least 2 tokens are needed (one and its successor), got {num_tokens}")
    if bos_token_id is None:
        return evaluation_windows(num_tokens, window, stride), window if stride is None else stride
    if window < 2:
        raise ValueError(f"a window with a BOS needs room for one more token, got window {window}")
    if stride is None or stride == window:
        stride = window - 1
    start_and_rest = evaluation_windows(num_tokens, window - 1, stride)
    start, stop, _ = start_and_rest[0]
    return [(start, stop, 0), *start_and_rest[1:]], stride


def _check_request(parity: str | None, counts: dict[str, int | None]) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if parity not in (None, "published"):
        raise ValueError(f'parity must be "published" or None, got {parity!r}')
