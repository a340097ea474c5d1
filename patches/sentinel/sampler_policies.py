"""Span policies that meet a removal exactly: uniform, fixed and boundary.

With m usable tokens and K slots, n spans of lengths in [low, high] can remove any number of entries in
[n (low - K), min(n (high - K), m - n K)].
"""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """What spans must obey and how many entries they should remove."""

    first: int
    stop: int
    low: int
    high: int
    slots: int
    target: int
    generator: random.Random

    @property
    def usable(self) -> int:
        """Tokens that spans may cover."""
        return self.stop - self.first

    def counts(self, removal: int) -> range:
        """Numbers of spans that can remove so many entries."""
        least = -(-removal // (self.high - self.slots))
        most = min(removal // (self.low - self.slots), (self.usable - removal) // self.slots)
        return range(least, most + 1)

    def closest_removal(self) -> int:
        """The reachable removal nearest to the target, the lower one on a tie."""
        nearest = (self.target + sign * distance for distance in range(self.target + 1) for sign in (-1, 1))
        return next(removal for removal in nearest if self.counts(removal))

    def largest_removal(self) -> int:
        """The largest reachable removal."""
        # More spans remove more until they fill the row; the best number is one of the two around that point.
        most = self.usable // self.low
        around = {min(most, self.usable // self.high + extra) for extra in (0, 1)}
        return max(min(n * (self.high - self.slots), self.usable - n * self.slots) for n in around)


def uniform(plan: Plan) -> Spans:
    """Draw lengths uniformly, adjust them one token at a time until exact, and place them uniformly."""
    draw, removal = plan.generator, plan.closest_removal()
    lengths: list[int] = []
    missing = removal
    while missing > 0:
        lengths.append(draw.randint(plan.low, plan.high))
        missing -= lengths[-1] - plan.slots
    counts = plan.counts(removal)
    # Leave the last span out where that is nearer to the removal.
    number = len(lengths) - (missing < 0 and -missing > missing + lengths[-1] - plan.slots)
    number = min(max(number, counts[0]), counts[-1])
    lengths = lengths[:number] + [draw.randint(plan.low, plan.high) for _ in range(number - len(lengths))]
    excess = sum(lengths) - number * plan.slots - removal
    while excess:
        chosen, step = draw.randrange(number), -1 if excess > 0 else 1
        if plan.low <= lengths[chosen] + step <= plan.high:
            lengths[chosen] += step
            excess += step
    free = plan.usable - sum(lengths)
    places = sorted(draw.sample(range(free + number), number))
    return _lay(plan, lengths, [place - order for order, place in enumerate(places)])


def fixed(plan: Plan) -> Spans:
    """Lay the fewest spans evenly; lengths and gaps differ by at most 1."""
    removal = plan.closest_removal()
    number = plan.counts(removal)[0]
    total = removal + number * plan.slots
    free = plan.usable - total
    lengths = [(order + 1) * total // number - order * total // number for order in range(number)]
    return _lay(plan, lengths, [(order + 1) * free // (number + 1) for order in range(number)])


def _lay(plan: Plan, lengths: Sequence[int], free_before: Sequence[int]) -> Spans:
    """Return the spans of given lengths with so many uncovered tokens before each."""
    covered = [0, *accumulate(lengths)]
    starts = [plan.first + free + before for free, before in zip(free_before, covered, strict=False)]
    return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def boundary(plan: Plan, boundaries: Sequence[int]) -> Spans:
    """Cover segments from their starts, in random order; the last span is shortened to be exact."""
    segments = _segments(plan, boundaries)
    plan.generator.shuffle(segments)
    pieces = [piece for segment in segments for piece in _pieces(plan, *segment)]
    spans, removed = _fill(plan, pieces)
    if removed == plan.target:
        return sorted(spans)
    # The longest first: if this order is not exact, none is.
    pieces.sort(key=lambda piece: piece[0] - piece[1])
    spans, removed = _fill(plan, pieces)
    fewer, left = _fill(plan, pieces[: len(spans) - 1])
    return sorted(fewer if removed > plan.target and plan.target - left <= removed - plan.target else spans)


def largest_in_segments(plan: Plan, boundaries: Sequence[int]) -> int:
    """The largest removal that `boundary` can reach."""
    pieces = [piece for segment in _segments(plan, boundaries) for piece in _pieces(plan, *segment)]
    return sum(end - start - plan.slots for start, end in pieces)


def _segments(plan: Plan, boundaries: Sequence[int]) -> Spans:
    """Return the segments that start at a boundary, up to the next one or the end of the region."""
    ends = [*boundaries[1:], plan.stop]
    inside = [(start, end) for start, end in zip(boundaries, ends, strict=False) if plan.first <= start < plan.stop]
    return [(start, min(end, plan.stop)) for start, end in inside]


def _pieces(plan: Plan, start: int, end: int) -> Spans:
    """Cut a segment into consecutive spans of the longest length; a rest that is too short stays out."""
    cuts = [(place, min(place + plan.high, end)) for place in range(start, end, plan.high)]
    return [(place, stop) for place, stop in cuts if stop - place >= plan.low]


def _fill(plan: Plan, pieces: Spans) -> tuple[Spans, int]:
    """Take pieces in order until the target is met, shorten from the last; returns them and what they remove."""
    removals = list(accumulate(end - start - plan.slots for start, end in pieces))
    number = min(len(pieces), bisect_left(removals, plan.target) + 1) if plan.target else 0
    spans, excess = list(pieces[:number]), max(0, removals[number - 1] - plan.target) if number else 0
    for order in reversed(range(number)):
        start, end = spans[order]
        cut = min(excess, end - start - plan.low)
        spans[order] = (start, end - cut)
        excess -= cut
    return spans, sum(end - start - plan.slots for start, end in spans)
