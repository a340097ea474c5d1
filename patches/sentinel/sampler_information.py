"""The span policy that covers the tokens with the lowest scores: exact removal first, score second.

Spans maximise ``price * removed - sum of covered scores``; the price is found by bisection, so that slightly too much
is removed, and the dearest span ends are given back until the removal is exact. Cost: tokens x bisection steps.
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from patches.sentinel.sampler_policies import Plan, Spans

STEPS = 40


def low_information(plan: Plan, scores: Sequence[float]) -> Spans:
    """Cover low scores with spans that remove the closest reachable number of entries.

    Args:
        plan: Lengths, region and target.
        scores: One number for each token of the row.
    """
    removal = plan.closest_removal()
    if not removal:
        return []
    usable = scores[plan.first : plan.stop]
    floor = min(0.0, *usable)
    prefix = [0.0, *accumulate(score - floor for score in usable)]
    cheap, dear = 0.0, prefix[-1] + 1.0
    spans = _best_spans(prefix, dear, plan)
    for _ in range(STEPS):
        if _removed(spans, plan) == removal:
            break
        price = (cheap + dear) / 2
        tried = _best_spans(prefix, price, plan)
        if _removed(tried, plan) < removal:
            cheap = price
        else:
            dear, spans = price, tried
    _make_exact(spans, prefix, plan, removal)
    return [(plan.first + start, plan.first + end) for start, end in spans]


def _removed(spans: Spans, plan: Plan) -> int:
    return sum(end - start - plan.slots for start, end in spans)


def _best_spans(prefix: Sequence[float], price: float, plan: Plan) -> Spans:
    """Return the spans with the largest value at a price, by dynamic programming with a sliding maximum."""
    value, origin = [0.0], [-1]
    starts: deque[tuple[float, int]] = deque()  # value of a span that starts here, decreasing
    for end in range(1, len(prefix)):
        if end >= plan.low:
            start = end - plan.low
            worth = value[start] - price * start + prefix[start]
            while starts and starts[-1][0] <= worth:
                starts.pop()
            starts.append((worth, start))
            if starts[0][1] < end - plan.high:
                starts.popleft()
        covered = starts[0][0] + price * (end - plan.slots) - prefix[end] if starts else float("-inf")
        value.append(max(value[-1], covered))
        origin.append(starts[0][1] if covered > value[-2] else -1)
    spans, end = [], len(prefix) - 1
    while end > 0:
        if origin[end] >= 0:
            spans.append((origin[end], end))
        end = origin[end] if origin[end] >= 0 else end - 1
    return spans[::-1]


def _make_exact(spans: Spans, prefix: Sequence[float], plan: Plan, removal: int) -> None:
    """Drop spans that are too many, then move ends one token at a time, the best one first."""

    def mean(order: int) -> float:
        start, end = spans[order]
        return (prefix[end] - prefix[start]) / (end - start)

    while len(spans) > plan.counts(removal)[-1]:
        del spans[max(range(len(spans)), key=mean)]
    while (excess := _removed(spans, plan) - removal) > 0:
        _shrink(spans, prefix, plan)
    for _ in range(-excess):
        _grow(spans, prefix, plan)


def _shrink(spans: Spans, prefix: Sequence[float], plan: Plan) -> None:
    """Give back the dearest end token of a span that may be shorter."""
    ends = []
    for order, (start, end) in enumerate(spans):
        if end - start > plan.low:
            ends.append((prefix[start + 1] - prefix[start], order, (start + 1, end)))
            ends.append((prefix[end] - prefix[end - 1], order, (start, end - 1)))
    _, order, span = max(ends)
    spans[order] = span


def _grow(spans: Spans, prefix: Sequence[float], plan: Plan) -> None:
    """Cover one token more: the cheapest neighbour of a span, or one behind neighbouring spans, which move up."""
    lefts, rights = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(prefix) - 1]
    gaps = [right - left for left, right in zip(lefts, rights, strict=True)]
    choices = []
    for order, (start, end) in enumerate(spans):
        if end - start < plan.high:
            gap = min((gap for gap, size in enumerate(gaps) if size), key=lambda gap: abs(2 * gap - 2 * order - 1))
            distance = order - gap if gap <= order else gap - order - 1
            token = start - 1 if gap <= order else end
            choices.append((distance, prefix[token + 1] - prefix[token], order, gap))
    _, _, order, gap = min(choices)
    start, end = spans[order]
    if gap <= order:
        spans[gap:order] = [(a - 1, b - 1) for a, b in spans[gap:order]]
        spans[order] = (start - 1, end)
    else:
        spans[order + 1 : gap] = [(a + 1, b + 1) for a, b in spans[order + 1 : gap]]
        spans[order] = (start, end + 1)
