"""Token weights against fixtures made with the published code, and against a row-by-row version in plain Python."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from losses.token_weights import TokenWeighting, weight_statistics, weighted_nll_sum

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "token_weighting"
TENSORS = load_file(FIXTURES / "weights.safetensors")
TABLE = json.loads((FIXTURES / "weights.json").read_text())
TOP_K = json.loads((FIXTURES / "topk.json").read_text())


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def fixture_inputs(name):
    tensors = (TENSORS.get(f"in.{name}.{part}") for part in ("long", "base", "valid"))
    return tuple(tensors)


@pytest.mark.parametrize("case", sorted(TABLE["cases"]))
def test_weights_losses_and_statistics_equal_the_published_ones(case):
    name, variant = case.split("/")
    record = TABLE["cases"][case]
    long_nll, base_nll, valid = fixture_inputs(name)
    kept = [tensor.clone() for tensor in (long_nll, base_nll)]
    generator = seeded(record["generator_seed"] or 7)
    weights = TokenWeighting(**record["weighting"]).weights(
        long_nll.requires_grad_(), base_nll.requires_grad_(), valid, generator
    )
    expected = TENSORS[f"w.{name}.{variant}"]
    tolerance = 2e-7 if name == "fp64" else 1e-5
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert float(((weights - expected).abs() / expected.abs().clamp_min(0.1)).max()) <= tolerance
    for tensor, before in zip((long_nll, base_nll), kept, strict=True):
        torch.testing.assert_close(tensor.detach(), before, rtol=0, atol=0, equal_nan=True)
    total, count = weighted_nll_sum(long_nll, weights, valid)
    assert (total.dtype, count.dtype) == (torch.float32, torch.int64)
    assert int(count) == record.get("num_targets", weights.numel())
    assert float(total.detach()) / int(count) == pytest.approx(record["loss"], rel=1e-5)
    statistics = weight_statistics(weights, valid)
    assert {name: float(value) for name, value in statistics.items()} == pytest.approx(record["statistics"], rel=1e-5)


@pytest.mark.parametrize("record", TOP_K, ids=lambda record: record["name"])
def test_masks_equal_the_published_ones(record):
    scores = torch.tensor(record["scores"])
    weighting = TokenWeighting(transforms=("max",), sparsity=record["sparsity"], zero_fill="random", parity=True)
    weights = weighting.weights(scores, torch.zeros_like(scores), generator=seeded(record["generator_seed"]))
    assert weights.tolist() == record["mask"]


def naive_row(weighting, long_row, base_row):
    """Weights of the valid targets of one row; sparse rows without random filling."""
    scores = []
    for full, short in zip(long_row, base_row, strict=True):
        short = full if math.isnan(short) else short
        score = full - short if weighting.compare == "difference" else (full + 1e-5) / (short + 1e-5)
        for transform in weighting.transforms:
            word, _, number = transform.partition(" ")
            score = {
                "absolute": lambda r: abs(r),
                "minus": lambda r: -r,
                "exp": math.exp,
                "max": lambda r: max(r, 0.0),
                "shift": lambda r, x=number: r - math.log(float(x)),
            }[word](score)
        scores.append(score if weighting.truncation is None else min(score, weighting.truncation))
    if weighting.sparsity is not None:
        budget = max(1, math.floor(weighting.sparsity * len(scores)))
        best = sorted(range(len(scores)), key=lambda place: (scores[place], place))[-budget:]
        scores = [float(place in best and scores[place] != 0) for place in range(len(scores))]
    if all(score == 0 for score in scores):
        scores = [1.0] * len(scores)
    if weighting.normalization == "L1":
        scores = [len(scores) * score / sum(scores) for score in scores]
    if weighting.normalization == "softmax":
        shares = [math.exp(score) for score in scores]
        scores = [len(scores) * share / sum(shares) for share in shares]
    lam = weighting.interpolation
    return scores if lam is None else [lam + (1 - lam) * score for score in scores]


WEIGHTINGS = [
    TokenWeighting.preset("dense"),
    TokenWeighting.preset("sparse"),
    TokenWeighting.preset("sparse", sparsity=0.5, interpolation=0.3),
    TokenWeighting.preset("sparse", sparsity=0.01),
    TokenWeighting.preset("longce"),
    TokenWeighting.preset("longce", truncation=None),
    TokenWeighting.preset("ppmi", shift=1.5),
    TokenWeighting.preset("npmi", sparsity=0.4, normalization=None),
    TokenWeighting.preset("ce"),
    TokenWeighting(normalization="softmax", interpolation=0.1),
    TokenWeighting(transforms=("minus", "shift 3"), truncation=0.2, normalization="softmax"),
    TokenWeighting(compare="quotient"),
    TokenWeighting(compare="quotient", transforms=("minus", "exp"), normalization="L1"),
]


def random_losses(seed=0, shape=(5, 23)):
    """Losses with ties, missing scores and targets that do not count (these hold NaN); one row has no target."""
    generator = torch.Generator().manual_seed(seed)
    long_nll = torch.rand(shape, generator=generator, dtype=torch.float64) * 5
    base_nll = long_nll + torch.randn(shape, generator=generator)
    base_nll[:, :4] = long_nll[:, :4]
    base_nll[1, 6:9] = float("nan")
    base_nll[2] = long_nll[2]
    valid = torch.rand(shape, generator=generator) < 0.7
    valid[3] = False
    return long_nll.masked_fill(~valid, float("nan")), base_nll.masked_fill(~valid, float("nan")), valid


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_rows_equal_the_plain_version_of_their_valid_targets(weighting):
    long_nll, base_nll, valid = random_losses()
    weights = weighting.weights(long_nll, base_nll, valid)
    assert bool((weights[~valid] == 0).all())
    for row in range(len(valid)):
        here = valid[row]
        expected = naive_row(weighting, long_nll[row, here].tolist(), base_nll[row, here].tolist())
        assert weights[row, here].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("parity", [False, True])
def test_random_filling_sees_valid_targets_only(parity):
    weighting = TokenWeighting.preset("sparse", sparsity=0.5, zero_fill="random", parity=parity)
    long_nll, base_nll, valid = random_losses()
    for row in (0, 2):
        here = valid[row]
        compressed = weighting.weights(long_nll[row, here][None], base_nll[row, here][None], None, seeded())
        padded = weighting.weights(long_nll[row][None], base_nll[row][None], valid[row][None], seeded())
        assert torch.equal(padded[0, here], compressed[0])


def tied_scores():
    """Three rows of scores: no zeros, 3 of 20 positive, all zero."""
    scores = torch.rand(3, 20, generator=seeded(1)) + 0.1
    scores[1, 3:] = 0
    scores[2] = 0
    return scores


def random_mask(scores, generator, sparsity=0.25, **options):
    weighting = TokenWeighting(transforms=("max",), sparsity=sparsity, zero_fill="random", **options)
    return weighting.weights(scores, torch.zeros_like(scores), generator=generator)


def test_random_filling_keeps_the_budget_and_all_positive_scores():
    scores = tied_scores()
    before = torch.random.get_rng_state()
    masks = torch.stack([random_mask(scores, seeded(seed)) for seed in range(200)])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert bool((masks.sum(-1) == 5).all())
    assert bool((masks[:, 1, :3] == 1).all())
    assert bool((masks[:, 0] == masks[0, 0]).all())
    # Every zero has its chance.
    assert bool((masks[:, 1, 3:].sum(0) > 0).all()) and bool((masks[:, 2].sum(0) > 0).all())
    assert torch.equal(masks[3], random_mask(scores, seeded(3)))
    assert not torch.equal(masks[3], masks[4])


def test_a_row_depends_on_its_own_generator_alone():
    scores = tied_scores()
    ours = random_mask(scores, [seeded(0), seeded(1), seeded(2)])
    for row in range(3):
        assert torch.equal(ours[row], random_mask(scores[row : row + 1], [seeded(row)])[0])
    others = random_mask(scores, [seeded(5), seeded(1), seeded(6)])
    assert torch.equal(ours[1], others[1]) and not torch.equal(ours[2], others[2])


def test_parity_permutes_every_row_once_any_row_has_too_many_zeros():
    """The published loop, written out; it draws for rows that need no filling, too."""
    scores, generator, expected = tied_scores(), seeded(), torch.zeros(3, 20)
    scores[0, :2] = 0
    for row in range(3):
        order = torch.sort(scores[row], stable=True).indices
        zeros = int((scores[row] == 0).sum())
        order[:zeros] = order[torch.randperm(zeros, generator=generator)]
        expected[row, order[-5:]] = 1
    assert torch.equal(random_mask(scores, seeded(), parity=True), expected)
    assert not torch.equal(random_mask(scores, seeded()), expected)


def test_a_share_of_zeros_that_fits_exactly_draws_nothing():
    scores, generator = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 0.2, 0.3, 0.1]]), seeded()
    for parity in (False, True):
        mask = random_mask(scores, generator, sparsity=0.3, parity=parity)
        assert mask.tolist() == [[0] * 7 + [1] * 3]
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_without_filling_a_zero_is_never_kept():
    scores = tied_scores()
    weighting = TokenWeighting.preset("sparse", sparsity=0.25)
    weights = weighting.weights(scores, torch.zeros_like(scores))
    assert (weights > 0).sum(-1).tolist() == [5, 3, 20]
    assert weights[0].max() == 4 and weights[2].unique().tolist() == [1]


def test_figures_of_a_published_training_sequence():
    long_nll, base_nll = torch.rand(2, 1, 32767, generator=seeded(), dtype=torch.float64)
    base_nll[:, :8191] = torch.nan
    dense = TokenWeighting.preset("dense").weights(long_nll, base_nll)
    assert bool((dense[:, :8191] == 0.75).all()) and float(dense[:, 8191:].mean()) == pytest.approx(1.0833, abs=5e-5)
    sparse = TokenWeighting.preset("sparse").weights(long_nll, base_nll)
    assert int((sparse > 0).sum()) == 6553 and float(sparse.max()) == pytest.approx(5.0003, abs=5e-5)
    assert bool((TokenWeighting.preset("longce").weights(long_nll, base_nll)[:, :8191] == 1).all())
    for name in ("sparse", "ppmi", "npmi"):
        assert bool((TokenWeighting.preset(name).weights(long_nll, base_nll)[:, :8191] == 0).all())


@pytest.mark.parametrize("low", ["long_nll", "base_nll"])
def test_the_wider_dtype_computes(low):
    long_nll, base_nll, valid = random_losses()
    inputs = {"long_nll": long_nll, "base_nll": base_nll}
    inputs[low] = inputs[low].float()
    mixed = TokenWeighting.preset("dense").weights(**inputs, valid=valid)
    wide = TokenWeighting.preset("dense").weights(*(tensor.double() for tensor in inputs.values()), valid)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, wide)


def test_the_gradient_of_the_sum_is_the_weight():
    long_nll, base_nll, valid = random_losses()
    leaf = long_nll.float().requires_grad_()
    weights = TokenWeighting.preset("dense").weights(leaf, base_nll.float(), valid)
    given = weights.masked_fill(~valid, float("nan")).requires_grad_()
    total, count = weighted_nll_sum(leaf, given, valid)
    total.backward()
    assert torch.equal(leaf.grad, weights) and given.grad is None
    assert int(count) == int(valid.sum()) and bool(total.isfinite())


def test_statistics_of_no_target_are_zero():
    weights = torch.ones(2, 3)
    assert all(float(value) == 0 for value in weight_statistics(weights, weights < 0).values())
