"""Decay groups and schedules."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.optimization import Optimization, decay_groups, lr_schedule, total_grad_norm


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


def rates(name, steps=20, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = lr_schedule(optimizer, name, max_steps=steps, **options)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_warms_up_and_reaches_a_real_minimum():
    found = rates("cosine", warmup_steps=4, min_lr_ratio=0.1)
    assert found[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    middle = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 16)) / 2)
    assert found[12] == pytest.approx(middle) and found[20] == pytest.approx(0.2)
    assert rates("cosine", warmup_steps=0, min_lr_ratio=0.0)[20] == pytest.approx(0.0)


def test_constant_and_linear():
    assert rates("constant", warmup_steps=2, min_lr_ratio=0.0)[2:] == [2.0] * 19
    assert rates("linear", warmup_steps=0, min_lr_ratio=0.0)[10] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "needs schedule=cosine"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"min_lr_ratio": 2.0}, r"in \[0, 1\]"),
        ({"warmup_steps": -1}, "warmup_steps at least 0"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Optimization(**options)


def test_grad_norm_is_over_all_parameters():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert total_grad_norm([a, b, c]).item() == pytest.approx(5.0)
