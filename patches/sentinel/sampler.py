"""Which spans of a row to compress: exact in what it removes, random or not, and the published sampler for comparison.

Lengths count original tokens; a span of length l with K slots removes l - K cache entries.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from patches.sentinel.published_sampler import mark_words, published_spans
from patches.sentinel.sampler_information import low_information
from patches.sentinel.sampler_policies import Plan, boundary, fixed, largest_in_segments, uniform
from patches.sentinel.sampler_recent import forgotten, recent, span_length

__all__ = ["SpanSampler", "achieved_ratio", "mark_words", "max_compression_ratio", "sample_spans"]

Policy = Literal["uniform", "fixed", "boundary", "low_information", "published", "budget", "proportional"]
# Spans of these are closed late, with a third number, and their slots may be forgotten.
RECENT = ("budget", "proportional")


def sample_spans(
    num_tokens: int,
    compression_ratio: float,
    *,
    min_length: int = 2,
    max_length: int = 25,
    slots: int = 1,
    policy: Policy = "uniform",
    protect_head: int = 0,
    protect_tail: int = 0,
    generator: random.Random,
    boundaries: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    strict: bool = False,
    slot_share: float = 0.25,
) -> list[tuple[int, ...]]:
    """Choose the spans of one row so that ``floor(compression_ratio * num_tokens + 0.5)`` entries are removed.

    Args:
        num_tokens: Original tokens of the row (words of the line for "published").
        compression_ratio: Fraction of entries removed, net of kept slots, in [0, 1).
        min_length: Shortest span; at least ``slots + 1`` is used.
        max_length: Longest span.
        slots: K, entries that stay of a span.
        policy: "uniform": lengths uniform, places uniform. "fixed": fewest spans, evenly laid, not random.
            "boundary": spans start at segment starts. "low_information": spans cover the lowest scores. "published":
            the published sampler bit for bit, which does not reach its ratio; other options keep their defaults.
            "budget", "proportional": spans of ``max_length`` tokens (fewer where little is left), oldest first, closed
            late; see `sampler_recent`.
        protect_head: First tokens that stay out of spans.
        protect_tail: Last tokens that stay out of spans.
        generator: Source of randomness.
        boundaries: Start indices of segments (sentences, lines); for "boundary" only.
        scores: One number for each token, such as its loss; for "low_information" only.
        strict: Raise instead of removing the closest number that spans can remove (the lower one on a tie).
        slot_share: Part of the entries that "budget" and "proportional" leave to slots.

    Returns:
        Sorted, disjoint, half-open spans; with the token they are closed before where that is not their end.

    Raises:
        ValueError: on options that cannot be, or, with `strict`, a ratio that spans cannot reach.
    """
    sampler = SpanSampler(
        compression_ratio,
        min_length=min_length,
        max_length=max_length,
        policy=policy,
        protect_head=protect_head,
        protect_tail=protect_tail,
        slot_share=slot_share,
    )
    return sampler(num_tokens, slots=slots, generator=generator, boundaries=boundaries, scores=scores, strict=strict)


@dataclass(frozen=True)
class SpanSampler:
    """Options of `sample_spans`, to be called with rows."""

    compression_ratio: float = 0.5
    min_length: int = 2
    max_length: int = 25
    policy: Policy = "uniform"
    protect_head: int = 0
    protect_tail: int = 0
    slot_share: float = 0.25

    def __post_init__(self) -> None:
        protected = (self.protect_head, self.protect_tail)
        _check_options(self.compression_ratio, self.min_length, self.max_length, 1, self.policy, protected)
        if not 0 < self.slot_share <= 1:
            raise ValueError(f"slot_share is a part of the entries, in (0, 1], got {self.slot_share}")

    def forget(self, num_tokens: int, slots: int) -> int | None:
        """What the layout of a row is to forget, in thousandths of the closed spans; see `SpanLayout.forget`."""
        if self.policy not in RECENT:
            return None
        left = num_tokens - self.protect_tail - int(self.compression_ratio * num_tokens + 0.5)
        length = span_length(left, max_length=self.max_length, slots=slots)
        return forgotten(self.compression_ratio, length=length, slots=slots, slot_share=self.slot_share)

    def __call__(
        self,
        num_tokens: int,
        *,
        slots: int = 1,
        generator: random.Random,
        boundaries: Sequence[int] | None = None,
        scores: Sequence[float] | None = None,
        strict: bool = False,
    ) -> list[tuple[int, ...]]:
        """Choose the spans of one row; see `sample_spans`."""
        self._check_call(slots, boundaries, scores, strict=strict)
        if self.policy == "published":
            ratio, longest = self.compression_ratio, self.max_length
            return [*published_spans(num_tokens, ratio, max_length=longest, generator=generator)]
        plan = self._plan(num_tokens, slots, generator)
        if self.policy in RECENT:
            return self._recent_spans(plan)
        starts = _checked_boundaries(boundaries or (), num_tokens)
        spans = self._exact_spans(plan, starts, scores or (), num_tokens)
        removed = sum(end - start - slots for start, end in spans)
        if strict and removed != plan.target:
            largest = largest_in_segments(plan, starts) if self.policy == "boundary" else plan.largest_removal()
            raise ValueError(
                f"compression_ratio {self.compression_ratio} removes {plan.target} of {num_tokens} tokens, which these "
                f"spans cannot (closest: {removed}); the largest ratio they reach is {largest / max(num_tokens, 1):.4f}"
            )
        return [*spans]

    def _plan(self, num_tokens: int, slots: int, generator: random.Random) -> Plan:
        return Plan(
            first=self.protect_head,
            stop=max(self.protect_head, num_tokens - self.protect_tail),
            low=max(self.min_length, slots + 1),
            high=self.max_length,
            slots=slots,
            target=int(self.compression_ratio * num_tokens + 0.5),
            generator=generator,
        )

    def _exact_spans(
        self, plan: Plan, starts: list[int], scores: Sequence[float], num_tokens: int
    ) -> list[tuple[int, int]]:
        if self.policy == "boundary":
            return boundary(plan, starts)
        if self.policy == "low_information":
            return low_information(plan, _checked_scores(scores, num_tokens))
        return uniform(plan) if self.policy == "uniform" else fixed(plan)

    def _recent_spans(self, plan: Plan) -> list[tuple[int, ...]]:
        ratio, left = self.compression_ratio, plan.stop - plan.target
        length = span_length(left, max_length=plan.high, slots=plan.slots)
        plan = replace(plan, low=min(plan.low, length), high=length)
        forget = forgotten(ratio, length=length, slots=plan.slots, slot_share=self.slot_share)

        def budget(token: int) -> int:
            if self.policy == "budget" or token == plan.stop:
                return left
            past = token - int(token * ratio)
            # Folding takes a span at once: without some allowance the past would be smaller than that, on average.
            return past + min((plan.high - plan.slots) // 2, past // 16)

        return [*recent(plan, budget, forget)]

    def _check_call(
        self, slots: int, boundaries: Sequence[int] | None, scores: Sequence[float] | None, *, strict: bool
    ) -> None:
        protected = (self.protect_head, self.protect_tail)
        _check_options(self.compression_ratio, self.min_length, self.max_length, slots, self.policy, protected)
        for name, value, owner in (("boundaries", boundaries, "boundary"), ("scores", scores, "low_information")):
            if (value is None) == (self.policy == owner):
                given = "none" if value is None else "some"
                raise ValueError(f"{name} belong to policy {owner!r}, got {given} for {self.policy!r}")
        if self.policy == "published":
            _check_published(self.min_length, slots, protected, strict)


def achieved_ratio(spans: Sequence[Sequence[int]], num_tokens: int, *, slots: int = 1) -> float:
    """Return the fraction of cache entries that closing these spans removes, net of kept slots."""
    return sum(span[1] - span[0] - slots for span in spans) / num_tokens if num_tokens else 0.0


def max_compression_ratio(
    num_tokens: int,
    *,
    min_length: int = 2,
    max_length: int = 25,
    slots: int = 1,
    protect_head: int = 0,
    protect_tail: int = 0,
) -> float:
    """Return the largest ratio that spans of these lengths can reach in a row."""
    _check_options(0.0, min_length, max_length, slots, "uniform", (protect_head, protect_tail))
    stop = max(protect_head, num_tokens - protect_tail)
    plan = Plan(protect_head, stop, max(min_length, slots + 1), max_length, slots, 0, random.Random(0))
    return plan.largest_removal() / num_tokens if num_tokens else 0.0


def _check_options(
    compression_ratio: float, min_length: int, max_length: int, slots: int, policy: str, protected: tuple[int, int]
) -> None:
    if not 0 <= compression_ratio < 1:
        raise ValueError(f"compression_ratio is the fraction removed, in [0, 1), got {compression_ratio}")
    if policy not in get_args(Policy):
        raise ValueError(f"unknown policy {policy!r}, use one of {', '.join(get_args(Policy))}")
    if slots < 1 or min_length < 1 or min(protected) < 0:
        raise ValueError(
            f"slots and min_length must be >= 1 and protections >= 0, got {slots}, {min_length}, {protected}"
        )
    if max_length <= slots or max_length < min_length:
        raise ValueError(
            f"max_length must exceed the slots and reach min_length, got {max_length}, {slots}, {min_length}"
        )


def _check_published(min_length: int, slots: int, protected: tuple[int, int], strict: bool) -> None:
    if (min_length, slots, protected, strict) != (2, 1, (0, 0), False):
        raise ValueError(
            "the published sampler has only compression_ratio and max_length, "
            f"got min_length={min_length}, slots={slots}, protections {protected}, strict={strict}"
        )


def _checked_boundaries(boundaries: Sequence[int], num_tokens: int) -> list[int]:
    starts = sorted({int(start) for start in boundaries})
    if starts and not 0 <= starts[0] <= starts[-1] <= num_tokens:
        raise ValueError(f"boundaries must lie in [0, {num_tokens}], got {starts[0]} to {starts[-1]}")
    return starts


def _checked_scores(scores: Sequence[float], num_tokens: int) -> list[float]:
    values = [float(score) for score in scores]
    if len(values) != num_tokens or not all(abs(value) < float("inf") for value in values):
        raise ValueError(f"scores must be {num_tokens} finite numbers, one for each token, got {len(values)}")
    return values
