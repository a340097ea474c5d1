"""Grouped cross attention as one operator of autograd, whatever engine computes it.

An engine keeps the base 2 log-sum-exp of every slot, in a shape of its own, and recomputes the rest. With
``dP = dO V'`` and ``delta = sum_c P dP`` of each slot: ``dw = sum delta``, ``dA = w P (dP - delta)``,
``dQ = scale dA K``, ``dK = scale dA' Q``, ``dV = w P' dO``.

Legend: B batch, N query groups, S rows of a group, H heads, Hk kv heads, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.gca.arguments import Arguments
from kernels.gca.cpu import CPUEngine


class Engine(Protocol):
    """What computes the operator; results are freshly allocated and contiguous."""

    def statistics_shape(self, arguments: Arguments) -> tuple[int, ...]:
        """Return the shape of the log-sum-exps."""
        ...

    def forward(self, arguments: Arguments, scale: float, *, softmax_off_by_one: bool) -> tuple[Tensor, Tensor]:
        """Return the output ``[B, N, S, H, D]`` in the dtype of q, and the log-sum-exps (float32, or float64)."""
        ...

    def backward(
        self, arguments: Arguments, reverse: Tensor | None, grad_out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of q, k, v and weights, in their shapes and dtypes, from that of the output.

        Args:
            arguments: as in `forward`.
            reverse: int32 ``[...]`` of `reverse_index`, or None.
            grad_out: ``[B, N, S, H, D]`` in the dtype of q.
            lse: the log-sum-exps of `forward`.
            scale: factor of the scores.
        """
        ...


def _engine(name: str) -> Engine:
    """Return an engine: "triton", "cpu" (plain PyTorch, any device) or "native" (compiled C where it serves)."""
    if name != "triton":
        return CPUEngine(compiled=name == "native")
    from kernels.gca.triton import TritonEngine  # triton is optional and slow to import

    return TritonEngine()


@torch.library.custom_op("longhaul::gca", mutates_args=())
def gca_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    reverse: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Compute `grouped_cross_attention` ``[B, N, S, H, D]`` in the dtype of ``q``, and the log-sum-exps.

    The tensors are those of `Arguments`, with ``reverse`` int32 for the backward of "triton".
    """
    arguments = Arguments(q, k, v, indices, weights, kv_lengths)
    return _engine(engine).forward(arguments, scale, softmax_off_by_one=softmax_off_by_one)


@torch.library.custom_op("longhaul::gca_backward", mutates_args=())
def gca_backward_operator(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    reverse: Tensor | None,
    lse: Tensor,
    scale: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and weights from that of the output, ``[B, N, S, H, D]`` in the dtype of q."""
    arguments = Arguments(q, k, v, indices, weights, kv_lengths)
    return _engine(engine).backward(arguments, reverse, grad_out, lse, scale)


@gca_operator.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = _engine(rest[-1]).statistics_shape(Arguments(q, k, v, indices, weights, None))
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@gca_backward_operator.register_fake
def _fake_backward(_grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, _, weights, *_ = inputs
    return tuple(x.new_empty(x.shape) for x in (q, k, v, weights))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _, ctx.engine = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad_out.device.type, enabled=False):
        grads = gca_backward_operator(grad_out, *ctx.saved_tensors, ctx.scale, ctx.engine)
    grad_q, grad_k, grad_v, grad_weights = grads
    return grad_q, grad_k, grad_v, None, grad_weights, *(None,) * 5


gca_operator.register_autograd(_differentiate, setup_context=_save)
