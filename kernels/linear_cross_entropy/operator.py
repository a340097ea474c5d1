"""The per-token loss as an operation of autograd.

Notable: in eager mode a `Function`, whose products dispatch modes and FLOP counters see; for a compiler, which cannot
trace a choice of rows that depends on the data, the same two functions as one opaque operator.

Legend: N targets, M model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy.chunked import IGNORED, Options, Tensors, backward, forward


def chunked_nll(tensors: Tensors, targets: Tensor, options: Options) -> Tensor:
    """Compute the losses ``[N]``, float32 at least.

    Args:
        tensors: hidden ``[N, M]``, weight ``[V, M]`` and bias ``[V]`` or None, float types.
        targets: ``[N]`` int64, `IGNORED` where nothing is asked.
        options: how to compute.
    """
    if torch.compiler.is_compiling():
        return token_nll_operator(*tensors, targets, *astuple(options))[0]
    nll: Tensor = TokenNLL.apply(*tensors, targets, options)
    return nll


class TokenNLL(torch.autograd.Function):
    """The chunked loss; keeps its inputs and one log-sum-exp a row, or the gradient rows of a frozen head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
    ) -> Tensor:
        """Return the losses ``[N]``, float32 at least, of ``hidden`` ``[N, M]`` and ``weight`` ``[V, M]``."""
        nll, lse, kept = forward((hidden, weight, bias), targets, options)
        if options.keep_rows:
            ctx.save_for_backward(kept, targets)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.dtype, ctx.options = hidden.dtype, options
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias, in their dtypes, from ``grad_nll`` ``[N]``."""
        if ctx.options.keep_rows:
            kept, targets = ctx.saved_tensors
            return _scale_rows(kept, targets, grad_nll).to(ctx.dtype), None, None, None, None
        *tensors, targets, lse = ctx.saved_tensors
        with torch.autocast(grad_nll.device.type, enabled=False):
            grads = backward(tuple(tensors), targets, lse, grad_nll, ctx.needs_input_grad[:3], ctx.options)
        return (*grads, None, None)


def _scale_rows(kept: Tensor, targets: Tensor, grad_nll: Tensor) -> Tensor:
    """Multiply the kept rows by the upstream gradient; inactive rows are 0, whatever they hold."""
    active = (targets != IGNORED) & (grad_nll != 0)
    return torch.where(active[:, None], kept * grad_nll[:, None], 0.0)


@torch.library.custom_op("longhaul::token_nll", mutates_args=())
def token_nll_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_size: int,
    softcap: float | None,
    dtype: torch.dtype,
    keep_rows: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses and log-sum-exps ``[N]`` and the rows kept (float32 at least): `forward` for a compiler.

    The tensors are those of `chunked_nll`, the rest the fields of `Options`.
    """
    return forward((hidden, weight, bias), targets, Options(chunk_size, softcap, dtype, keep_rows, fused))


@token_nll_operator.register_fake
def _fake(hidden: Tensor, _weight: Tensor, _bias: Tensor | None, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
    chosen = Options(*options)
    shapes = (targets.shape, targets.shape, hidden.shape if chosen.keep_rows else (0,))
    return tuple(hidden.new_empty(shape, dtype=chosen.acc) for shape in shapes)


@torch.library.custom_op("longhaul::token_nll_backward", mutates_args=())
def token_nll_backward_operator(
    tensors: Sequence[Tensor | None],
    grad_nll: Tensor,
    wanted: Sequence[bool],
    chunk_size: int,
    softcap: float | None,
    dtype: torch.dtype,
    fused: bool,
) -> list[Tensor]:
    """Return the wanted gradients, in the dtypes of their tensors, from ``grad_nll`` ``[N]``.

    `tensors` are hidden ``[N, M]``, weight ``[V, M]``, bias ``[V]`` or None, targets and log-sum-exps ``[N]``.
    """
    hidden, weight, bias, targets, lse = tensors
    assert hidden is not None and weight is not None and targets is not None and lse is not None
    options = Options(chunk_size, softcap, dtype, keep_rows=False, fused=fused)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = backward((hidden, weight, bias), targets, lse, grad_nll, tuple(wanted), options)
    return [grad for grad in grads if grad is not None]


@token_nll_backward_operator.register_fake
def _fake_backward(
    tensors: Sequence[Tensor | None], _grad_nll: Tensor, wanted: Sequence[bool], *_options: Any
) -> list[Tensor]:
    chosen = (x for x, want in zip(tensors, wanted, strict=False) if x is not None and want)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in chosen]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *rest = inputs
    _, lse, kept = output
    ctx.chunk_size, ctx.softcap, ctx.compute, ctx.keep_rows, ctx.fused = rest
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(*((kept, targets) if ctx.keep_rows else (hidden, weight, bias, targets, lse)))
    ctx.mark_non_differentiable(lse, kept)


def _differentiate(ctx: Any, grad_nll: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.keep_rows:
        kept, targets = ctx.saved_tensors
        return _scale_rows(kept, targets, grad_nll).to(ctx.dtype), *(None,) * 8
    wanted = [x is not None and want for x, want in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=False)]
    grads = iter(
        token_nll_backward_operator(
            ctx.saved_tensors, grad_nll, wanted, ctx.chunk_size, ctx.softcap, ctx.compute, ctx.fused
        )
    )
    return *(next(grads) if want else None for want in wanted), *(None,) * 6


token_nll_operator.register_autograd(_differentiate, setup_context=_save)
