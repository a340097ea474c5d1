"""Scores, budgets and choices of slots, without a model."""

import math

import pytest
import torch
from piece_models import FIXTURES, fixture
from safetensors.torch import load_file

from patches.parallel_context import Calibration, TokenEviction, observation_scores, pyramid_budgets
from patches.parallel_context.eviction import pool_scores

STORED = fixture("eviction.json")
CASE = STORED["eviction_a"]
RANGE = {name: CASE[name] for name in ("scale", "start", "stop")}


@pytest.fixture(scope="module")
def tensors():
    return load_file(FIXTURES / "eviction_a.safetensors")


def test_stored_scores(tensors):
    query, key = tensors["query"], tensors["key"]
    found = observation_scores(query[:, :, -CASE["observation"] :], key, kernel=CASE["kernel"], **RANGE)
    assert (found - tensors["observation_scores"]).abs().max() < 1e-5
    found = observation_scores(query, key, kernel=1, **RANGE)
    assert (found - tensors["accumulated_scores"]).abs().max() < 5e-5


@pytest.mark.parametrize("case", CASE["keep"], ids=lambda case: f"{case['method']}-{case['capacity']}")
def test_stored_choices(tensors, case):
    eviction = TokenEviction(
        case["method"],
        capacity=case["capacity"],
        observation=CASE["observation"],
        kernel=CASE["kernel"],
        sinks=CASE["sinks"],
    )
    place = {"layer": CASE["layer"], "num_layers": CASE["layers"]}
    assert eviction.keep(tensors["query"], tensors["key"], **RANGE, **place).tolist() == case["slots"]


def test_closed_form():
    def det(a, b):
        i = torch.arange(4 * 20 * 4, dtype=torch.float64)
        return (a * torch.sin(1.7 * i + b) + 0.3 * torch.cos(0.9 * i * i + b)).view(1, 4, 20, 4)

    case = STORED["closed_form_snap"]
    query, key = det(2, 0.2), det(1, 0.7)
    found = observation_scores(query[:, :, -2:], key, scale=0.5, start=1, stop=15, kernel=7)
    assert (found.flatten() - torch.tensor(case["scores"], dtype=torch.float64)).abs().max() < 1e-6
    kept = TokenEviction(capacity=6, observation=2, kernel=7).keep(query, key, scale=0.5, start=1, stop=15)
    assert kept[0].tolist() == case["keep6"]


@pytest.mark.parametrize("block", [1, 2**20])
def test_scores_agree_with_the_dense_softmax(monkeypatch, block):
    monkeypatch.setattr("patches.parallel_context.eviction.BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 3, 13, 4, generator=generator, dtype=torch.float64)
    logits = 0.8 * query @ key.repeat_interleave(2, 1).mT
    future = torch.arange(13) > torch.arange(5)[:, None] + 8
    summed = torch.softmax(logits.masked_fill(future, -math.inf), -1).sum(2)[..., 2:11]
    pooled = torch.stack([summed[..., max(i - 1, 0) : i + 2].mean(-1) for i in range(9)], -1)
    expected = pooled.unflatten(1, (3, 2)).mean(2)
    found = observation_scores(query, key, scale=0.8, start=2, stop=11, kernel=3, pool="mean")
    assert (found - expected).abs().max() < 1e-12


def test_max_pooling_stays_inside():
    scores = torch.tensor([[[3.0, 0.0, 1.0, 2.0]]])
    assert pool_scores(scores, 3, "max").tolist() == [[[3.0, 3.0, 2.0, 2.0]]]


def test_stored_budgets():
    for case in STORED["pyramid"]:
        budgets = pyramid_budgets(case["capacity"], case["num_layers"], beta=case["beta"], length=case.get("length"))
        assert budgets == case["budgets"]
    assert pyramid_budgets(7, 1) == [7]


def test_random_choice_has_a_seed_of_its_own():
    query, key = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 40, 4)
    eviction = TokenEviction("random", capacity=5, seed=3)

    def kept(layer, patch=eviction):
        return patch.keep(query, key, scale=1.0, start=2, stop=40, layer=layer)

    state = torch.get_rng_state()
    first = kept(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, kept(0)) and torch.equal(first[0], first[1])
    assert not torch.equal(first, kept(1))
    assert not torch.equal(first, kept(0, TokenEviction("random", capacity=5, seed=4)))
    assert first.min() >= 2 and (first.diff() > 0).all()


def test_stored_calibration():
    for stored in STORED["calibration"]:
        attention = torch.tensor(stored["attention"], dtype=torch.float64)
        for case in stored["cases"]:
            calibration = Calibration(case["kind"], threshold=case["threshold"], margin=case["margin"])
            assert calibration.keep(attention).tolist() == case["keep"]
