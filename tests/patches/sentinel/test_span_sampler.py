import itertools
import random
from collections import Counter

import pytest
from sentinel_cases import stored

from patches.sentinel import SpanSampler, achieved_ratio, mark_words, max_compression_ratio, sample_spans

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
SHAPES = list(itertools.product((5, 40, 131), (1, 2, 3), ((2, 25), (4, 9), (3, 6)), ((0, 0), (4, 0), (3, 8))))


def reachable(num_tokens, slots, lengths, protected):
    low, high = max(lengths[0], slots + 1), lengths[1]
    usable = max(0, num_tokens - sum(protected))
    numbers = range(usable // low + 1)
    return [
        removal
        for removal in range(num_tokens + 1)
        if any(n * (low - slots) <= removal <= min(n * (high - slots), usable - n * slots) for n in numbers)
    ]


def check_bounds(spans, num_tokens, slots, lengths, protected):
    previous = protected[0]
    for start, end in spans:
        assert previous <= start and max(lengths[0], slots + 1) <= end - start <= lengths[1]
        previous = end
    assert previous <= max(protected[0], num_tokens - protected[1])


def extra(policy, num_tokens, draw):
    return {"scores": [draw.random() for _ in range(num_tokens)]} if policy == "low_information" else {}


@pytest.mark.parametrize("policy", ["uniform", "fixed", "low_information"])
def test_the_closest_reachable_removal_is_met(policy):
    for (num_tokens, slots, lengths, protected), ratio in itertools.product(SHAPES, RATIOS):
        draw = random.Random(num_tokens + slots)
        options = {"slots": slots, "min_length": lengths[0], "max_length": lengths[1], "policy": policy}
        options |= {"protect_head": protected[0], "protect_tail": protected[1], "generator": draw}
        spans = sample_spans(num_tokens, ratio, **options, **extra(policy, num_tokens, draw))
        check_bounds(spans, num_tokens, slots, lengths, protected)
        target, possible = int(ratio * num_tokens + 0.5), reachable(num_tokens, slots, lengths, protected)
        wanted = min(possible, key=lambda removal: (abs(removal - target), removal))
        assert sum(end - start - slots for start, end in spans) == wanted
        assert achieved_ratio(spans, num_tokens, slots=slots) == wanted / num_tokens


def test_the_largest_ratio_is_that_of_the_reachable_removals():
    for num_tokens, slots, lengths, (head, tail) in SHAPES:
        options = {"min_length": lengths[0], "max_length": lengths[1], "protect_head": head, "protect_tail": tail}
        largest = max(reachable(num_tokens, slots, lengths, (head, tail))) / num_tokens
        assert max_compression_ratio(num_tokens, slots=slots, **options) == pytest.approx(largest)
    assert max_compression_ratio(0) == achieved_ratio([], 0) == 0


def test_strict_names_the_largest_ratio():
    draw = random.Random(0)
    with pytest.raises(ValueError, match=r"0\.8000"):
        sample_spans(100, 0.9, max_length=5, strict=True, generator=draw)
    spans = sample_spans(100, 0.8, max_length=5, strict=True, generator=draw)
    assert achieved_ratio(spans, 100) == 0.8
    with pytest.raises(ValueError, match=r"0\.1800"):
        sample_spans(50, 0.5, policy="boundary", boundaries=[40], strict=True, generator=draw)


def test_lengths_are_near_their_mean_and_coverage_is_flat():
    draw, counts, rounds = random.Random(0), Counter(), 3000
    lengths = []
    for _ in range(rounds):
        for start, end in sample_spans(200, 0.4, generator=draw):
            lengths.append(end - start)
            counts.update(range(start, end))
    assert 10.5 < sum(lengths) / len(lengths) < 16
    assert {2, 25} < set(lengths)
    middle = [counts[token] / rounds for token in range(25, 175)]
    assert max(middle) - min(middle) < 0.09


def test_draws_depend_on_the_generator_only():
    spans = [sample_spans(256, 0.5, generator=random.Random(seed)) for seed in (1, 1, 2)]
    assert spans[0] == spans[1] != spans[2]
    sampler = SpanSampler(0.5)
    assert sampler(256, generator=random.Random(1)) == spans[0]
    state = random.Random(3)
    assert sampler(64, slots=2, generator=state) != sampler(64, slots=2, generator=state)


def test_fixed_spans_are_few_and_even():
    spans = sample_spans(1000, 0.6, policy="fixed", min_length=16, max_length=64, slots=4, generator=random.Random(0))
    assert len(spans) == 10  # 600 / (64 - 4)
    lengths = [end - start for start, end in spans]
    edges = [0, *itertools.chain(*spans), 1000]
    gaps = [right - left for left, right in zip(edges[::2], edges[1::2], strict=True)]
    assert max(lengths) - min(lengths) <= 1 and max(gaps) - min(gaps) <= 1
    assert spans == sample_spans(
        1000, 0.6, policy="fixed", min_length=16, max_length=64, slots=4, generator=random.Random(9)
    )


def test_boundary_spans_start_where_segments_do():
    draw, starts = random.Random(5), set()
    boundaries = [0, 7, 9, 30, 95, 97, 120]
    for _ in range(60):
        spans = sample_spans(150, 0.3, policy="boundary", boundaries=boundaries, max_length=20, generator=draw)
        assert sum(end - start - 1 for start, end in spans) == 45
        check_bounds(spans, 150, 1, (2, 20), (0, 0))
        ends = {end for start, end in spans if end - start == 20}
        for start, end in spans:
            assert start in boundaries or start in ends
            assert not any(start < other < end for other in boundaries)
        starts.update(start for start, _ in spans)
    assert starts >= {0, 9, 30, 97, 120}


def test_boundary_meets_every_removal_that_its_segments_allow():
    draw = random.Random(6)
    for _ in range(200):
        boundaries = sorted({draw.randrange(40) for _ in range(draw.randint(1, 6))})
        slots, low, high = 1, 4, draw.randint(6, 12)
        target = draw.randint(0, 30)
        pieces = [
            min(place + high, end) - place
            for begin, end in zip(boundaries, [*boundaries[1:], 40], strict=True)
            for place in range(begin, end, high)
        ]
        room = [length - slots for length in pieces if length >= low]
        subsets = [chosen for n in range(len(room) + 1) for chosen in itertools.combinations(room, n)]
        possible = {t for chosen in subsets for t in range(len(chosen) * (low - slots), sum(chosen) + 1)}
        options = {"min_length": low, "max_length": high, "boundaries": boundaries, "policy": "boundary"}
        spans = sample_spans(40, target / 40, generator=draw, **options)
        removed = sum(end - start - slots for start, end in spans)
        assert removed == min(possible, key=lambda removal: (abs(removal - target), removal))


def test_low_information_covers_what_says_least():
    draw = random.Random(7)
    scores = [3 + draw.random() for _ in range(120)]
    quiet = [*range(20, 32), *range(70, 84)]
    for token in quiet:
        scores[token] = draw.random()
    spans = sample_spans(120, 24 / 120, policy="low_information", scores=scores, generator=draw)
    assert [token for start, end in spans for token in range(start, end)] == quiet
    for ratio in (0.2, 0.5, 0.8):
        scores = [draw.expovariate(1.0) for _ in range(256)]
        chosen = sample_spans(256, ratio, policy="low_information", scores=scores, generator=draw)
        others = [sample_spans(256, ratio, generator=draw) for _ in range(20)]
        cost, *rest = (sum(sum(scores[start:end]) for start, end in spans) for spans in [chosen, *others])
        assert cost < 0.93 * min(rest)


def test_low_information_is_near_the_best_of_all_choices():
    def every_choice(start):
        """All sets of spans of 2 to 4 tokens from here on, of 11 tokens."""
        yield []
        for begin in range(start, 10):
            for end in range(begin + 2, min(begin + 4, 11) + 1):
                for rest in every_choice(end):
                    yield [(begin, end), *rest]

    draw = random.Random(8)
    choices = [spans for spans in every_choice(0) if sum(end - start - 1 for start, end in spans) == 4]
    ratios = []
    for _ in range(60):
        scores = [draw.random() for _ in range(11)]
        spans = sample_spans(11, 4 / 11, max_length=4, policy="low_information", scores=scores, generator=draw)
        cost, best = (
            sum(sum(scores[start:end]) for start, end in chosen)
            for chosen in (spans, min(choices, key=lambda chosen: sum(sum(scores[a:b]) for a, b in chosen)))
        )
        ratios.append(cost / best)
    assert sum(ratios) / len(ratios) < 1.05 and sorted(ratios)[30] == pytest.approx(1)


@pytest.mark.parametrize("case", stored("published_sampler")["spans"], ids=lambda case: str(case["num_words"]))
def test_published_draws(case):
    spans = sample_spans(
        case["num_words"],
        case["compression_ratio"],
        policy="published",
        max_length=case["max_length"],
        generator=random.Random(case["seed"]),
    )
    assert [list(span) for span in spans] == case["spans"]


def test_published_marking():
    case = stored("published_sampler")["marked"]
    draw = random.Random(case["seed"])
    sampler = SpanSampler(case["compression_ratio"], max_length=case["max_length"], policy="published")
    for text, marked in zip(case["texts"], case["marked"], strict=True):
        spans = sampler(len(text.split(" ")), generator=draw)
        assert mark_words(text, spans) == marked
    assert mark_words("a b c", [(0, 1), (1, 3)], names=("[", "]")) == "[ a ] [ b c ]"


@pytest.mark.parametrize(
    ("ratio", "options", "message"),
    [
        (1.0, {}, "fraction removed"),
        (-0.1, {}, "fraction removed"),
        (0.5, {"max_length": 2, "slots": 2}, "max_length"),
        (0.5, {"min_length": 9, "max_length": 8}, "max_length"),
        (0.5, {"policy": "random"}, "unknown policy"),
        (0.5, {"protect_head": -1}, "protections"),
        (0.5, {"slots": 0}, "slots"),
        (0.5, {"policy": "boundary"}, "boundaries"),
        (0.5, {"policy": "low_information"}, "scores"),
        (0.5, {"boundaries": [0]}, "boundaries"),
        (0.5, {"policy": "boundary", "boundaries": [0, 99]}, "boundaries"),
        (0.5, {"policy": "low_information", "scores": [1.0]}, "finite numbers"),
        (0.5, {"policy": "published", "slots": 2}, "published"),
        (0.5, {"policy": "published", "protect_tail": 1}, "published"),
        (0.5, {"policy": "published", "max_length": 40}, "more than max_length"),
    ],
)
def test_impossible_options_are_refused(ratio, options, message):
    with pytest.raises(ValueError, match=message):
        sample_spans(40, ratio, generator=random.Random(0), **options)


def test_a_sampler_checks_its_options_at_once():
    with pytest.raises(ValueError, match="unknown policy"):
        SpanSampler(policy="best")
    with pytest.raises(ValueError, match="fraction removed"):
        SpanSampler(1.5)
