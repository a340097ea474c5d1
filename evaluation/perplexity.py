"""Perplexity of a token stream: every target once, summed in float64, exponential at the very end.

Notable: what is scored depends on the stream alone, never on window, stride or model, so numbers of different
context lengths and models are comparable. A model is anything called as ``model(input_ids=...)`` that returns logits.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from evaluation.scoring import Corpus, TokenStream, Window, WindowTally, score_windows, scoring_mode, window_batches


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
            mean losses, the first token of each window unscored; a shorter last window counts as much as the others.
        max_tokens: score only the first so many tokens of the stream.
        dtype: autocast dtype; None computes in the model's own.
        progress: show a progress bar on the error stream.

    Returns:
        ``nll_sum``, ``num_targets``, ``loss`` (nats per target), ``perplexity``, ``bits_per_byte``,
        ``position_edges``, ``position_nll_sum``, ``position_counts`` (see `evaluation.positions`), ``windows``
        (start, stop, first target, nll_sum of each) and the protocol: ``window``, ``stride``, ``bos_token_id``,
        ``num_tokens``, ``num_windows``, ``corpus`` (identity), ``dtype``.

    Raises:
        ValueError: sizes that cannot be scored, ids outside the model's vocabulary, or a parity with other windows.
    """
    _check_request(batch_size, max_windows, max_tokens, parity)
    stream = TokenStream.open(tokens, max_tokens)
    windows, stride = _plan(stream.num_tokens, window, stride, bos_token_id)
    if parity is not None and (bos_token_id is not None or stride != window):
        raise ValueError('parity="published" means windows that do not overlap and no BOS; leave both options out')
    tally = WindowTally(window, published=parity is not None)
    batches = _shown(list(window_batches(windows[:max_windows], batch_size)), f"scoring {window}", progress)
    with scoring_mode(model, dtype) as device:
        for batch in batches:
            tally.add(batch, *score_windows(model, stream, batch, bos_token_id, device))
    return tally.report(stream.bytes_per_token) | {
        "window": window,
        "stride": stride,
        "bos_token_id": bos_token_id,
        "num_tokens": stream.num_tokens,
        "num_windows": len(tally.windows),
        "corpus": stream.identity,
        "dtype": str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
    }


def _shown(batches: list[list[Window]], label: str, progress: bool) -> Iterable[list[Window]]:
    return track(batches, label, console=Console(stderr=True), transient=True, disable=not progress)


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


def _check_request(batch_size: int, max_windows: int | None, max_tokens: int | None, parity: str | None) -> None:
    for name, value in (("batch_size", batch_size), ("max_windows", max_windows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if parity not in (None, "published"):
        raise ValueError(f'parity must be "published" or None, got {parity!r}')
