"""Grouped cross attention on a CPU as one operator with its own backward; runs on any device.

The work is done by `tiles.py` (plain PyTorch) or, where a compiler was found and its result passed a check, by
`native.py`. Both keep the base 2 log-sum-exp of every slot and recompute the rest:

With ``dP = dO V'`` and ``delta = sum_c P dP`` of each slot: ``dw = sum delta``, ``dA = w P (dP - delta)``,
``dQ = scale dA K``, ``dK = scale dA' Q``, ``dV = w P' dO``.

Legend: B batch, N query groups, R = B N, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size, E stored
chunks, C keys of a chunk, K retrieved chunks.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.gca import native, tiles
from kernels.gca.layout import make_plan


@torch.library.custom_op("longhaul::gca_cpu", mutates_args=())
def gca_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the base 2 log-sum-exp of every slot, ``[Hk, R, K, S G]``."""
    plan = make_plan(q, k, indices, weights, kv_lengths)
    engine = native if compiled and native.serves(q, k) else tiles
    return engine.forward(plan, q, k, v, scale, softmax_off_by_one=softmax_off_by_one)


@torch.library.custom_op("longhaul::gca_cpu_backward", mutates_args=())
def gca_cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    lse: Tensor,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and weights."""
    plan = make_plan(q, k, indices, weights, kv_lengths)
    engine = native if compiled and native.serves(q, k) else tiles
    grad_q, grad_k, grad_v, grad_weights = engine.backward(plan, grad_out, q, k, v, lse, scale)
    return grad_q, grad_k, grad_v, grad_weights.view(weights.shape).to(weights.dtype)


@gca_cpu.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    batch, num_groups, rows, heads, _ = q.shape
    shape = (k.shape[3], batch * num_groups, indices.shape[2], rows * heads // k.shape[3])
    lse = q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@gca_cpu_backward.register_fake
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    lse: Tensor,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, weights))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _, ctx.compiled = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad_out.device.type, enabled=False):
        grads = gca_cpu_backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.compiled)
    grad_q, grad_k, grad_v, grad_weights = grads
    return grad_q, grad_k, grad_v, None, grad_weights, None, None, None, None


gca_cpu.register_autograd(_differentiate, setup_context=_save)
