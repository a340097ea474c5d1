"""LongPPL: perplexity over the key tokens of a text, those an evaluator predicts far better with the full context.

ICLR 2025, arXiv 2410.23771. Evaluator and evaluated model may have different tokenizers: key tokens travel as character
intervals of the text.

Legend: B sequences, C tokens of a text, T = C - 1 targets (index t is the token at position t + 1), L loss with full
context, S loss with short context.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.position_loss import bucket_nll
from evaluation.results import write_text
from evaluation.scoring import mean_report
from losses.base_scoring import score_base_nll

Interval = tuple[int, int]
_INTERVAL = re.compile(r"\s*\[\s*(\d+)\s*,\s*(\d+)\s*\]\s*")


class EncodedText(NamedTuple):
    """A text as tokens, and the characters ``[start, end)`` of each."""

    input_ids: Tensor
    """``[C]`` int64."""
    offsets: list[Interval]


def encode_text(
    tokenizer: Any, text: str, *, max_tokens: int | None = None, special_tokens: bool = True
) -> EncodedText:
    """Tokenise a text, cut to its first ``max_tokens`` tokens.

    Raises:
        ValueError: the tokenizer cannot say which characters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"character offsets need a fast tokenizer, got {type(tokenizer).__name__}")
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
    offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"][:max_tokens]]
    return EncodedText(torch.tensor(encoded["input_ids"][:max_tokens], dtype=torch.int64), offsets)


def full_context_nll(model: nn.Module, input_ids: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Return L of every target, ``[B, T]`` float32, for ``[B, C]``; the model's logits are never stored."""
    return score_base_nll(
        model,
        input_ids,
        base_length=input_ids.shape[1],
        base_stride=1,
        first_window=True,
        layout="batched",
        chunk_size=chunk_size,
    )


def short_context_nll(
    model: nn.Module, input_ids: Tensor, *, context_length: int = 4096, stride: int = 1024, **options: Any
) -> Tensor:
    """Return S of every target, ``[B, T]`` float32 for ``[B, C]``: K to K + d - 1 tokens are seen.

    Targets of the first K + d tokens, where short and full context are the same, are NaN.

    Args:
        model: Hugging Face causal LM.
        input_ids: ``[B, C]`` int64.
        context_length: K, tokens that every target sees at least.
        stride: d, targets that share a window.
        **options: further ones of `losses.base_scoring.score_base_nll`.
    """
    length = context_length + stride
    return score_base_nll(model, input_ids, base_length=length, base_stride=stride, tail="short", **options)


def key_tokens(long_nll: Tensor, short_nll: Tensor, *, alpha: float = 2.0, beta: float = -2.0) -> Tensor:
    """Mark the targets with ``S - L > alpha`` and ``L < -beta``: gained by the far context, and well predicted.

    Args:
        long_nll: L, any shape.
        short_nll: S, the same shape; NaN where there is none: no key token.
        alpha: least gain of log probability.
        beta: least log probability with the full context.
    """
    return (short_nll - long_nll > alpha) & (long_nll < -beta)


def key_intervals(offsets: Iterable[Sequence[int]] | Tensor, positions: Iterable[int] | Tensor) -> list[Interval]:
    """Return the characters of tokens as ascending intervals ``[start, end)``; touching ones are merged.

    Args:
        offsets: characters ``(start, end)`` of every token of the text.
        positions: the tokens, by their position (one more than the index of their target).
    """
    places = _plain(offsets)
    merged: list[Interval] = []
    for start, end in sorted(tuple(places[position]) for position in _plain(positions)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return merged


def tokens_in_intervals(
    offsets: Iterable[Sequence[int]] | Tensor, intervals: Iterable[Sequence[int]] | Tensor
) -> list[int]:
    """Return the positions of the tokens that lie wholly inside an interval; those without a character never do.

    The loss of token i has index i - 1; token 0 has none.
    """
    ordered = sorted((start, end) for start, end in _plain(intervals))
    starts = [start for start, _ in ordered]
    reach = list(accumulate((end for _, end in ordered), max))
    inside = []
    for position, (start, end) in enumerate(_plain(offsets)):
        earlier = bisect_right(starts, start)
        if start < end and earlier and end <= reach[earlier - 1]:
            inside.append(position)
    return inside


def long_ppl_sums(nll: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of the key tokens (float32 scalar) and their number (int64 scalar).

    LongPPL is ``exp(sum / count)`` over a corpus; without a key token there is no value.

    Args:
        nll: any shape; what is not key may hold anything.
        key: bool, the same shape.
    """
    return nll.float().masked_fill(~key, 0.0).sum(), key.sum()


def find_key_intervals(
    evaluator: nn.Module, text: EncodedText, *, alpha: float = 2.0, beta: float = -2.0, **windows: Any
) -> list[Interval]:
    """Return the characters of a text's key tokens.

    Args:
        evaluator: the model that tells what depends on the far context, on the device it is to run on.
        text: the text in the evaluator's tokens.
        alpha: see `key_tokens`.
        beta: see `key_tokens`.
        **windows: ``context_length``, ``stride`` and more, see `short_context_nll`.
    """
    tokens = _on_device(evaluator, text)
    if tokens.shape[1] < 2:
        return []
    key = key_tokens(
        full_context_nll(evaluator, tokens), short_context_nll(evaluator, tokens, **windows), alpha=alpha, beta=beta
    )
    return key_intervals(text.offsets, key[0].nonzero()[:, 0] + 1)


def evaluate_long_ppl(
    model: nn.Module, texts: Iterable[EncodedText], intervals: Iterable[Sequence[Interval]]
) -> dict[str, Any]:
    """Compute LongPPL and perplexity of a corpus.

    Args:
        model: the model that is evaluated.
        texts: the corpus in the model's tokens.
        intervals: the key characters of each text, from `find_key_intervals` or `read_key_file`.

    Returns:
        ``long_ppl`` (None without a key token), ``num_key_tokens``, ``ppl``, ``num_targets``, and ``documents``, see
        `score_document`.
    """
    documents = [score_document(model, text, found) for text, found in zip(texts, intervals, strict=True)]
    total = {name: math.fsum(document[name] for document in documents) for name in _NAMES}
    return {
        "long_ppl": _mean_exponential(total["key_nll_sum"], total["num_key_tokens"]),
        "num_key_tokens": int(total["num_key_tokens"]),
        "ppl": _mean_exponential(total["nll_sum"], total["num_targets"]),
        "num_targets": int(total["num_targets"]),
        "documents": documents,
    }


_NAMES = ("key_nll_sum", "num_key_tokens", "nll_sum", "num_targets")


def score_document(
    model: nn.Module, text: EncodedText, intervals: Sequence[Interval], *, edges: Sequence[int] = ()
) -> dict[str, Any]:
    """Sum the losses of a text.

    Args:
        model: the model that is evaluated.
        text: the text in the model's tokens.
        intervals: its key characters.
        edges: borders of position buckets, the last at least the number of targets.

    Returns:
        ``key_nll_sum``, ``num_key_tokens``, ``nll_sum``, ``num_targets``; with edges also ``position_nll_sum`` and
        ``position_counts`` of each bucket.
    """
    tokens = _on_device(model, text)
    nll = full_context_nll(model, tokens)[0].double() if tokens.shape[1] > 1 else torch.zeros(0, dtype=torch.float64)
    targets = [position - 1 for position in tokens_in_intervals(text.offsets, intervals) if position > 0]
    found = dict(zip(_NAMES, (float(nll[targets].sum()), len(targets), float(nll.sum()), len(nll)), strict=True))
    if edges:
        # bucket_nll counts positions of tokens, one more than the index of the target.
        sums, counts = bucket_nll(nll, None, [edge + 1 for edge in edges])
        found |= {"position_nll_sum": sums.tolist(), "position_counts": counts.tolist()}
    return found


def _mean_exponential(total: float, count: float) -> float | None:
    return mean_report(total, int(count), None)["perplexity"] if count else None


def _on_device(model: nn.Module, text: EncodedText) -> Tensor:
    return text.input_ids.to(next(model.parameters()).device)[None]


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def write_key_file(path: Path, documents: Iterable[Sequence[Interval]]) -> None:
    """Write key intervals, one line of ``[a, b];[c, d]`` for each document (empty without any)."""
    lines = (";".join(f"[{start}, {end}]" for start, end in intervals) for intervals in documents)
    write_text(path, "".join(line + "\n" for line in lines))


def read_key_file(path: Path) -> list[list[Interval]]:
    """Return the key intervals of each line.

    Raises:
        ValueError: a line holds anything else.
    """
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        pieces = [_INTERVAL.fullmatch(piece) for piece in line.split(";")] if line.strip() else []
        if None in pieces:
            raise ValueError(f"{path}, line {number}: expected intervals such as [3, 7];[9, 12], got {line[:80]!r}")
        documents.append([(int(piece[1]), int(piece[2])) for piece in pieces if piece])
    return documents
