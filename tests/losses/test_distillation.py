"""Distillation equals its formula in loops, and the stored values."""

import json
import math
from pathlib import Path

import pytest
import torch

from losses.distillation import distillation_loss

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kv_compression" / "distillation.json"


def test_stored_values():
    case = json.loads(FIXTURE.read_text())
    student, teacher = (torch.tensor(case[name]) for name in ("student_logits", "teacher_logits"))
    kl_sum, count = distillation_loss(
        student,
        teacher,
        torch.tensor(case["mask"]).bool(),
        temperature=case["temperature"],
        exclude_ids=case["exclude_ids"],
    )
    assert kl_sum.item() == pytest.approx(case["kl_sum"], rel=1e-5)
    assert count == case["count"]


def test_gradients_reach_the_student_only_and_are_finite():
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 7, generator=draw).requires_grad_()
    teacher = torch.randn(2, 3, 7, generator=draw).requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    with torch.no_grad():
        student[..., 6] = -math.inf
    distillation_loss(student, teacher, mask, temperature=3.0, exclude_ids=(6,))[0].backward()
    assert teacher.grad is None
    p, q = ((x.detach()[..., :6] / 3).softmax(-1) for x in (student, teacher))
    assert torch.allclose(student.grad[..., :6], 3 * (p - q) * mask[..., None], atol=1e-5)
    assert (student.grad[..., 6] == 0).all()


def test_temperature_is_above_zero():
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), temperature=0)
