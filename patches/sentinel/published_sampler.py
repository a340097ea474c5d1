"""The published sampler, reproduced draw for draw, and the marking of words that goes with it.

It gives up after a number of rejected attempts, so large ratios are not reached: 0.9 removes about 0.49.
"""

import random
from collections.abc import Sequence

SHORTEST_LINE = 30


def published_spans(
    num_words: int, compression_ratio: float, *, max_length: int, generator: random.Random
) -> list[tuple[int, int]]:
    """Draw the spans of a line of words.

    Raises:
        ValueError: if the line is too short for the longest span.
    """
    if num_words < SHORTEST_LINE or compression_ratio == 0:
        return []
    if num_words <= max_length:
        raise ValueError(
            f"the published sampler needs more than max_length={max_length} words, the line has {num_words}"
        )
    mean = (2 + max_length) / 2
    target = int(compression_ratio * (mean / (mean - 1)) * num_words)
    covered = [False] * num_words
    spans, attempts = [], 0
    while sum(covered) < target:
        start = generator.randint(0, num_words - max_length - 1)
        end = start + 1 + generator.randint(1, max_length - 1)
        if not any(covered[start:end]):
            covered[start:end] = [True] * (end - start)
            spans.append((start, end))
        attempts += 1
        if attempts >= 3 * (target // mean):
            break
    return sorted(spans)


def mark_words(text: str, spans: Sequence[tuple[int, int]], *, names: tuple[str, str] = ("<CL>", "<CR>")) -> str:
    """Put marks around spans of the words of a line; words are what lies between single blanks.

    Args:
        text: Line.
        spans: Half-open ranges of words.
        names: Marks before and after a span.
    """
    words = text.split(" ")
    starts, ends = ({span[side] for span in spans} for side in (0, 1))
    marked = []
    for place, word in enumerate(words):
        marked += [names[0]] * (place in starts) + [word] + [names[1]] * (place + 1 in ends)
    return " ".join(marked)
