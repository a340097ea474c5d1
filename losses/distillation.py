"""Distillation from a teacher's distribution over the next token.

Legend: B batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    exclude_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return ``tau^2 sum KL(teacher || student)`` over the masked positions, float32, and their number.

    Both distributions are softmaxes of ``logits / tau``. The teacher gets no gradient.

    Args:
        student_logits: ``[B, T, V]``.
        teacher_logits: ``[B, T, V]``.
        mask: bool ``[B, T]``, positions that count.
        temperature: tau, above 0.
        exclude_ids: columns that neither distribution has.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    kept = torch.ones(student_logits.shape[-1], dtype=torch.bool, device=student_logits.device)
    kept[list(exclude_ids)] = False
    # Columns are left out, not set to -inf: 0 * (-inf - -inf) would be NaN.
    student, teacher = (
        (logits[..., kept].float() / temperature).log_softmax(-1)
        for logits in (student_logits, teacher_logits.detach())
    )
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature**2 * torch.where(mask, kl, 0.0).sum(), mask.sum()
