"""How good generated texts are: likeness to a reference, variety, and what a judge model thinks of them.

Letters: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from evaluation.rouge import rouge
from evaluation.scoring import perplexity_of
from losses.output_head import evaluation_mode

Judge = Callable[[Sequence[str]], Mapping[str, float]]
Likeness = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
REPEATED_NGRAM = 4


def score_generations(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    judge: Judge | None = None,
    bertscore: Likeness | None = None,
) -> dict[str, float]:
    """Return the scores of generated texts.

    Args:
        predictions: texts.
        references: one for each.
        judge: texts to ``{"mean_text", "corpus", ...}``, such as `judge_perplexity` under a model.
        bertscore: F1 of each text with its reference, such as `evaluation.generation_quality.bert_score.BertScore`.

    Returns:
        ``rougeL`` (mean F1), ``distinct_1`` to ``distinct_4``, ``repetition`` (share of 4-grams that a text has had
        before, mean over texts), and where asked for ``bertscore_f1`` and ``judge_perplexity_*``.

    Raises:
        ValueError: lists of different lengths, or empty ones.
    """
    scores = {"rougeL": rouge(predictions, references)["rougeL"]}
    scores |= {f"distinct_{n}": distinct_n(predictions, n) for n in range(1, 5)}
    scores["repetition"] = sum(1 - distinct_n([text], REPEATED_NGRAM, empty=1.0) for text in predictions) / len(
        predictions
    )
    if bertscore is not None:
        found = bertscore(predictions, references)
        scores["bertscore_f1"] = math.fsum(found) / len(found)
    if judge is not None:
        scores |= {f"judge_perplexity_{name}": value for name, value in judge(predictions).items()}
    return scores


def distinct_n(texts: Sequence[str], n: int, *, empty: float = 0.0) -> float:
    """Return distinct n-grams / all n-grams of the blank-separated words of texts; n-grams lie within a text.

    Args:
        texts: texts, whose n-grams are counted together.
        n: words of an n-gram.
        empty: the value where there is no n-gram.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        ngrams = list(zip(*(words[start:] for start in range(n)), strict=False))
        seen.update(ngrams)
        total += len(ngrams)
    return len(seen) / total if total else empty


@torch.no_grad()
def judge_perplexity(
    model: nn.Module, completions: Sequence[Sequence[int]], prefixes: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """Return how likely a model finds completions.

    Args:
        model: causal LM.
        completions: token ids of each text.
        prefixes: token ids before each; only tokens of completions are targets. None: the first token of a completion
            is no target.

    Returns:
        ``mean_text``: mean over texts of ``exp(mean nll)``; ``corpus``: ``exp`` of the mean over all targets;
        ``num_targets``. Texts without a target are left out; the perplexity of no targets is None.

    Raises:
        ValueError: not one prefix for each completion.
    """
    if prefixes is not None and len(prefixes) != len(completions):
        raise ValueError(f"each completion needs one prefix, got {len(completions)} and {len(prefixes)}")
    device, sums = next(model.parameters()).device, []
    with evaluation_mode(model):
        for number, completion in enumerate(completions):
            before = list(prefixes[number]) if prefixes is not None else []
            ids = torch.tensor([[*before, *completion]], dtype=torch.int64, device=device)
            first = max(len(before), 1)
            if ids.shape[1] <= first:
                continue
            # An all-ones mask, because some models take positions without one for packed rows.
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
                0, first - 1 : -1
            ]
            nll = F.cross_entropy(logits.float(), ids[0, first:], reduction="none")
            sums.append((float(nll.double().sum()), len(nll)))
    total = sum(count for _, count in sums)
    return {
        "mean_text": math.fsum(perplexity_of(value / count) for value, count in sums) / len(sums) if sums else None,
        "corpus": perplexity_of(math.fsum(value for value, _ in sums) / total) if total else None,
        "num_targets": total,
    }
