"""Decay groups and schedules."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.optimization import Optimization, decay_groups, linear_to_zero, total_grad_norm


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_matrices_decay_and_norms_do_not_each_parameter_once():
    decayed, spared = decay_groups(Tied(), 0.1, "matrices")
    assert [p.shape for p in decayed["params"]] == [(5, 4)] and decayed["weight_decay"] == 0.1
    assert [p.shape for p in spared["params"]] == [(4,), (4,)] and spared["weight_decay"] == 0.0
    (everything,) = decay_groups(Tied(), 0.1, "all")
    assert len(everything["params"]) == 3


def rates(schedule, steps=20, **options):
    optimization = Optimization(lr=2.0, schedule=schedule, **options)
    return [optimization.lr_at(step, steps) for step in range(1, steps + 1)]


def test_cosine_warms_up_to_its_peak_and_ends_at_its_minimum():
    decay = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 16)) / 2) for i in range(1, 17)]
    found = rates("cosine", warmup_steps=4, min_lr_ratio=0.1)
    assert found == pytest.approx([0.5, 1.0, 1.5, 2.0, *decay])
    assert found[3] == 2.0 and found[-1] == 2.0 * 0.1
    assert rates("cosine")[-1] == 0.0 and rates("cosine")[0] == pytest.approx(2.0, rel=0.01)


def test_constant_and_linear():
    assert rates("constant", warmup_steps=2) == [1.0] + [2.0] * 19
    assert rates("linear", warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, *(2 - i / 8 for i in range(1, 17))])
    assert rates("cosine", steps=3, warmup_steps=4) == [0.5, 1.0, 1.5]
    assert Optimization(lr=2.0, schedule="constant").lr_at(10**6, None) == 2.0


def test_a_schedule_needs_its_length_and_a_warm_up_that_fits():
    with pytest.raises(ValueError, match="schedule=cosine needs max_steps"):
        Optimization().check_length(None)
    Optimization(schedule="constant").check_length(None)
    with pytest.warns(UserWarning, match="warm-up takes 4 of 3 steps"):
        Optimization(warmup_steps=4).check_length(3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "needs schedule=cosine"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"min_lr_ratio": 2.0}, r"in \[0, 1\]"),
        ({"warmup_steps": -1}, "warmup_steps at least 0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps at least 0"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Optimization(**options)


def test_grad_norm_is_over_all_parameters():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert total_grad_norm([a, b, c]).item() == pytest.approx(5.0)


def test_the_rates_of_transformers_trainer():
    found = linear_to_zero(0.2, 0.1, warmup_steps=2, max_steps=6)
    assert found == Optimization(
        lr=0.2, betas=(0.9, 0.999), weight_decay=0.1, decay="all", schedule="linear", warmup_steps=2
    )
    assert [found.lr_at(step, 6) for step in (1, 2, 4, 6)] == pytest.approx([0.1, 0.2, 0.1, 0.0])
    assert linear_to_zero(0.2, 0.1, warmup_steps=2, max_steps=None).lr_at(99, None) == 0.2
