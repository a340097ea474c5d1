"""Span policies that spare the newest tokens: the oldest ones are folded when the entries outgrow a budget.

Spans are ``(start, end, close)``: they stay as they are until the token of index ``close`` comes, as in generation
under a budget. Slots take a share of the budget; where there are more, the oldest are forgotten.

"budget": the entries of the past keep to what is left of the row, ``T - removal``, as in attention with a window.
"proportional": they follow what is left of the tokens so far, as in local attention. Both exceed it where it is small
beside a span, since folding spares the nearest past; after the last token they meet it exactly.
"""

from collections.abc import Callable

from patches.sentinel.sampler_policies import Plan

Closing = list[tuple[int, int, int]]


def span_length(num_left: int, *, max_length: int, slots: int) -> int:
    """Return the tokens of a span: ``max_length``, or a third of the entries left, if that is less.

    Before it is folded, a span needs its place in the budget.
    """
    return max(slots + 1, min(max_length, num_left // 3))


def forgotten(compression_ratio: float, *, length: int, slots: int, slot_share: float) -> int:
    """Return the thousandths of the closed spans that are forgotten, so that slots take a share of the entries.

    Of the entries ``1 - ratio`` that stay of a token, slots take ``slot_share``, the rest is its own. All other tokens
    are folded, into ``slots / length`` entries each.
    """
    left = 1 - compression_ratio
    folded = (1 - (1 - slot_share) * left) * slots / length
    return max(0, int(1000 * (1 - slot_share * left / folded))) if folded else 0


def recent(plan: Plan, budget: Callable[[int], int], forget: int) -> Closing:
    """Fold the oldest ``plan.high`` tokens whenever the past of a token outgrows its budget.

    Where the budget is small beside a span, folding waits until it leaves unfolded tokens for half of the budget: no
    token loses its nearest past.

    Args:
        plan: Region, lengths and removal.
        budget: Entries of the past that a token of an index may see.
        forget: Thousandths of the closed spans whose slots are gone.
    """
    spans: Closing = []
    folded, stop, slots = plan.first, plan.stop, plan.slots

    def kept(number: int) -> int:
        return slots * (number - number * forget // 1000)

    def entries(token: int) -> int:
        return kept(len(spans)) + token - (folded - plan.first)

    for token in range(plan.first + plan.high, plan.stop + 1):
        while entries(token) > budget(token) and token - folded - plan.high >= budget(token) // 2:
            spans.append((folded, folded + plan.high, token))
            folded += plan.high
    return _exact(plan, spans, entries(stop) - (stop - plan.target), kept)


def _exact(plan: Plan, spans: Closing, excess: int, kept: Callable[[int], int]) -> Closing:
    """Close one more span, or shorten the last, so that what is removed of the row is the target."""
    number = len(spans)
    if excess > 0:
        start = spans[-1][1] if spans else plan.first
        length = max(plan.low, excess + kept(number + 1) - kept(number))
        if start + length <= plan.stop:
            spans.append((start, start + length, plan.stop))
    elif excess < 0 and number:
        start, end, close = spans[-1]
        spans[-1] = (start, max(start + plan.low, end + excess), close)
    return spans
