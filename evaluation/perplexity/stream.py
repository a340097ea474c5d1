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
from evaluation.perplexity.reading import Reading, Window
from evaluation.perplexity.windows import score_windows
from evaluation.processes import Process
from evaluation.scoring import Corpus, TokenStream, scoring_mode
from evaluation.token_progress import TokenProgress


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
    segment_length: int | None = None,
) -> dict[str, Any]:
    """Score a stream: ``perplexity = exp(sum of NLL / number of targets)``.

    Args:
        model: see `score_stream`, as are ``tokens`` and ``dtype``.
        tokens: 1-D ids ``[n]`` or a token corpus.
        window: inputs per window, the BOS included; this and the others say how the stream is read, see `Reading`.
        stride: distance of the windows' starts; None: windows do not overlap.
        bos_token_id: put before every window.
        batch_size: windows per forward.
        max_windows: stop after so many windows.
        parity: ``"published"`` adds ``published_mean_loss``.
        max_tokens: score only the first so many tokens.
        dtype: autocast dtype.
        segment_length: read longer windows in pieces of so many tokens.

    Returns:
        The report of `score_stream`.

    Raises:
        ValueError: sizes that cannot be scored, ids outside the model's vocabulary, or a parity with other windows.
    """
    reading = Reading(
        window=window,
        stride=stride,
        bos_token_id=bos_token_id,
        batch_size=batch_size,
        max_windows=max_windows,
        max_tokens=max_tokens,
        segment_length=segment_length,
        parity=parity,
    )
    return score_stream(model, tokens, reading, dtype=dtype)


def score_stream(
    model: Any,
    tokens: Sequence[int] | np.ndarray | Tensor | Corpus,
    reading: Reading,
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    journal: Journal | None = None,
    process: Process | None = None,
) -> dict[str, Any]:
    """Score a stream, alone or with other processes, going on from what a journal holds.

    Args:
        model: a causal language model (suite or Hugging Face); it is scored in eval mode on the device where it
            stands, and its mode is put back.
        tokens: 1-D ids ``[n]`` or a token corpus.
        reading: how they are read.
        dtype: autocast dtype; None computes in the model's own.
        progress: show a progress bar on the error stream.
        journal: where finished batches are kept for a later call with the same arguments to go on from.
        process: one of several that have joined (`evaluation.gathering`): each scores its share of the batches, and
            all return the same report. None: alone.

    Returns:
        ``nll_sum``, ``num_targets``, ``loss`` (nats per target), ``perplexity``, ``bits_per_byte``,
        ``position_edges``, ``position_nll_sum``, ``position_counts`` (see `evaluation.positions`), ``windows``
        (start, stop, first target, nll_sum of each) and the protocol: ``window``, ``stride``, ``bos_token_id``,
        ``num_tokens``, ``num_windows``, ``corpus`` (identity), ``dtype``.

    Raises:
        ValueError: sizes that cannot be scored, or ids outside the model's vocabulary.
    """
    stream = TokenStream.open(tokens, reading.max_tokens)
    batches = reading.batches(stream.num_tokens)
    done = {} if journal is None else journal.scores()
    process = process or Process()
    mine = {n: batches[n] for n in range(process.rank, len(batches), process.world_size) if n not in done}
    collector = Collector(reading.window, reading.parity is not None, journal)
    with scoring_mode(model, dtype):
        _score(model, stream, reading, mine, collector, progress=progress)
    scores = done | {number: score for part in gather(collector.done, process) for number, score in part.items()}
    return report(scores, reading.window, bytes_per_token=stream.bytes_per_token) | {
        **reading.protocol(),
        "num_tokens": stream.num_tokens,
        "num_windows": sum(map(len, batches)),
        "corpus": stream.identity,
        "dtype": str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
    }


def _score(
    model: Any,
    stream: TokenStream,
    reading: Reading,
    batches: dict[int, list[Window]],
    collector: Collector,
    *,
    progress: bool,
) -> None:
    """Score batches by number."""
    total = sum(stop - start for batch in batches.values() for start, stop, _ in batch)
    with TokenProgress(f"scoring {reading.window}", total, show=progress) as advance:
        for number, batch in batches.items():
            losses, length = score_windows(
                model,
                stream,
                batch,
                bos_token_id=reading.bos_token_id,
                segment_length=reading.segment_length,
                report=advance,
            )
            collector.add(number, batch, losses, length)
        collector.flush()
