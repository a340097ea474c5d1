"""Find the needle: is the whole answer right at the end of a haystack of any length?

Notable: the haystack goes through the model's cache in segments, whose logits are never formed; then the row is
doubled, and one copy reads the true answer while the other reads what it generates. Sample i is a function of
(seed, i) and its haystack alone.

Letters: L tokens of a sample, A tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evaluation.scoring import TokenStream, scoring_mode

Report = Callable[[int], None]
"""Called with the number of tokens just read."""


class Sample(Protocol):
    """A haystack with needles, question and answer; `datamodules.niah.NeedleSample` is one."""

    input_ids: Any
    answer_start: int
    answer_length: int
    scored_position: int
    needle_spans: Any


class Task(Protocol):
    """What plants needles; `datamodules.niah.NeedleTask` does."""

    kind: Any

    def build(self, haystack: Any, *, seed: int, index: int = 0, depth: float | None = None) -> Sample:
        """Build sample ``index`` in a haystack ``[L]``."""

    def room(self, length: int) -> int:
        """Return how many places there are; raise ValueError if the needles do not fit."""


def evaluate_passkey(
    model: Any,
    task: Task,
    haystack: Any,
    *,
    length: int,
    num_samples: int,
    seed: int = 0,
    segment_length: int = 16384,
    offload: bool = True,
    depths: Sequence[float] | None = None,
    report: Report = lambda tokens: None,
) -> dict[str, Any]:
    """Score samples of one length.

    Args:
        model: a causal language model that reads on from its cache.
        task: what is planted.
        haystack: a token corpus, or ids ``[n]``; a shorter one is repeated.
        length: L.
        num_samples: how many samples.
        seed: of values and places.
        segment_length: tokens of a forward call.
        offload: keep the chunk memory, of models that have one, in host memory.
        depths: the samples go through these depths in turn; None draws places.
        report: told about every segment.

    Returns:
        Shares of samples: ``first_token``, ``last_token`` and ``scored_token`` (the published metric), each one token
        right given the true ones before; ``teacher_forced``, all tokens right given the true ones before;
        ``exact_match``, the whole answer generated greedily. ``predictions`` has what `answer_sample` returns.

    Raises:
        ValueError: an option out of range, or needles that do not fit.
    """
    if num_samples < 1 or segment_length < 1:
        raise ValueError(f"num_samples and segment_length must be at least 1, got {num_samples} and {segment_length}")
    stream, predictions = TokenStream.open(haystack), []
    with scoring_mode(model, None), chunk_memory(model, offload=offload):
        for index in range(num_samples):
            depth = None if depths is None else depths[index % len(depths)]
            sample = task.build(read_haystack(stream, index, length), seed=seed, index=index, depth=depth)
            found = answer_sample(model, sample, segment_length=segment_length, report=report)
            predictions.append({"index": index, "depth": depth} | found)
    return summary(predictions) | {"length": length, "predictions": predictions}


def read_haystack(stream: TokenStream, index: int, length: int) -> np.ndarray:
    """Return the haystack of sample ``index``: tokens from ``(index length) mod (n - length + 1)`` on.

    A shorter text is read in a circle: token ``(index length + j) mod n`` is the j-th.
    """
    size = stream.num_tokens
    if length <= size:
        start = index * length % (size - length + 1)
        return stream.read(start, start + length)
    whole = stream.read(0, size)
    return np.resize(np.roll(whole, -(index * length % size)), length)


def answer_sample(
    model: Any, sample: Sample, *, segment_length: int, report: Report = lambda tokens: None
) -> dict[str, Any]:
    """Let a model in evaluation mode answer one sample.

    Returns:
        ``answer``, ``teacher_forced`` (the likeliest token after each true prefix) and ``generated`` (greedy), ids
        ``[A]``; ``needle_start`` of the first needle; ``scored``, which of the tokens the published metric looks at.
    """
    start, stop = sample.answer_start, sample.answer_start + sample.answer_length
    ids = torch.from_numpy(np.asarray(sample.input_ids)).to(next(model.parameters()).device)
    logits, cache = prefill(model, ids[:start], segment_length=segment_length, report=report)
    chosen = [logits.argmax(-1).expand(2)]
    if sample.answer_length > 1:
        cache.batch_repeat_interleave(2)
    for position in range(start, stop - 1):
        # Row 0 reads the truth, row 1 what it said.
        tokens = torch.stack([ids[position], chosen[-1][1]])[:, None]
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chosen.append(output.logits[:, -1].argmax(-1))
    forced, generated = torch.stack(chosen, dim=1).tolist()
    return {
        "answer": ids[start:stop].tolist(),
        "teacher_forced": forced,
        "generated": generated,
        "scored": sample.scored_position - start,
        "needle_start": int(sample.needle_spans[0][0]),
    }


def prefill(model: Any, ids: Tensor, *, segment_length: int, report: Report) -> tuple[Tensor, Any]:
    """Read ``ids`` [L] in segments; return the last logits ``[V]`` and the cache."""
    cache, output = None, None
    for segment in ids.split(segment_length):
        output = model(input_ids=segment[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        report(len(segment))
    assert output is not None, "there is always a question"
    return output.logits[0, -1], cache


@contextmanager
def chunk_memory(model: Any, *, offload: bool) -> Iterator[None]:
    """Say where the caches that a model builds keep its chunks, if it has any."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "offload_chunk_memory"):
        yield
        return
    before, config.offload_chunk_memory = config.offload_chunk_memory, offload
    try:
        yield
    finally:
        config.offload_chunk_memory = before


def summary(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the shares of right tokens and answers, and the number of samples."""
    hits = [[token == true for token, true in zip(p["teacher_forced"], p["answer"], strict=True)] for p in predictions]
    shares = {
        "first_token": [hit[0] for hit in hits],
        "last_token": [hit[-1] for hit in hits],
        "scored_token": [hit[p["scored"]] for hit, p in zip(hits, predictions, strict=True)],
        "teacher_forced": [all(hit) for hit in hits],
        "exact_match": [p["generated"] == p["answer"] for p in predictions],
    }
    return {name: sum(right) / len(right) for name, right in shares.items()} | {"num_samples": len(predictions)}
