"""An example whose context can have any size, and the search for the size that fills a budget of tokens."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PROBES = 16
"""Sizes tried at most; a context grows nearly linearly, so a handful is enough."""
CLOSE = 512
"""A context that leaves less than this part of its budget is full."""


@dataclass(frozen=True)
class Draft:
    """One example before its size is known; the same size always gives the same text."""

    instruction: str
    context: Callable[[int], str]
    """The context of so many units (lines, words, entries)."""
    question: str
    """Between the context and the answer prefix."""
    answer_prefix: str
    outputs: list[str]
    max_new_tokens: int
    least: int = 1
    """Fewest units."""
    most: int | None = None
    """Most units there are."""
    guess: int = 100
    """Units that fill the budget, about."""


def draft_rng(task: str, seed: int, index: int, part: str = "") -> random.Random:
    """Return the generator of one part of an example; the same in every process."""
    return random.Random(f"{task}/{seed}/{index}/{part}")


class Growing:
    """A sequence that is drawn as far as it is read, so that a longer context begins like a shorter one."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source, self._items = source, list[str]()

    def first(self, count: int) -> list[str]:
        """Return the first items."""
        while len(self._items) < count:
            self._items.append(next(self._source))
        return self._items[:count]


def num_tokens_of(tokenizer: Any, text: str) -> int:
    """Count the tokens of a text, special tokens left out."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def fit(draft: Draft, num_tokens: int, tokenizer: Any) -> dict[str, Any]:
    """Return the record of the greatest context whose whole text and answer stay within ``num_tokens``.

    Raises:
        ValueError: the smallest context is too long already.
    """
    budget = num_tokens - draft.max_new_tokens

    def tokens(size: int) -> int:
        text = draft.instruction + draft.context(size) + draft.question + draft.answer_prefix
        return num_tokens_of(tokenizer, text)

    low, low_tokens = draft.least, tokens(draft.least)
    if low_tokens > budget:
        raise ValueError(
            f"{num_tokens} tokens are too few: the smallest example needs {low_tokens + draft.max_new_tokens} "
            f"({draft.max_new_tokens} of them for the answer)"
        )
    size, length = _largest(tokens, budget, (low, low_tokens), draft)
    context = draft.context(size)
    return {
        "instruction": draft.instruction,
        "context": context,
        "query": draft.question + draft.answer_prefix,
        "answer_prefix": draft.answer_prefix,
        "input": draft.instruction + context + draft.question,
        "outputs": list(draft.outputs),
        "length": length + draft.max_new_tokens,
        "max_new_tokens": draft.max_new_tokens,
    }


def _largest(tokens: Callable[[int], int], budget: int, low: tuple[int, int], draft: Draft) -> tuple[int, int]:
    """Return the greatest size within the budget and its tokens, by interpolation between sizes already tried."""
    start = low
    high: tuple[int, int] | None = None
    size = max(draft.guess, low[0] + 1)
    for _ in range(PROBES):
        if draft.most is not None:
            size = min(size, draft.most)
        if size <= low[0] or (high is not None and high[0] - low[0] <= 1) or (budget - low[1]) * CLOSE < budget:
            break
        count = tokens(size)
        if count <= budget:
            low = (size, count)
        else:
            high = (size, count)
        size = _next_size(start, low, high, budget)
    return low


def _next_size(start: tuple[int, int], low: tuple[int, int], high: tuple[int, int] | None, budget: int) -> int:
    if high is None:
        # Everything so far fits: go on at the mean cost of a unit.
        cost = max(0.1, (low[1] - start[1]) / max(1, low[0] - start[0]))
        return low[0] + max(1, int((budget - low[1]) / cost))
    share = (budget - low[1]) / max(1, high[1] - low[1])
    return min(high[0] - 1, max(low[0] + 1, low[0] + int(share * (high[0] - low[0]))))
