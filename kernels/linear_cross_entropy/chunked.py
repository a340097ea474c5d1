"""Per-token loss of a language-model head, tile by tile, forward and backward; plain PyTorch on any device.

Notable: a tile is a block of vocabulary entries times a block of rows, transposed, ``[U, S]``. The forward keeps a
running log-sum-exp of every row; the backward recomputes the logits of a tile from it. The vocabulary is the
outer loop, so the weight gradient of a stripe is complete, and rounded once, before the next stripe begins. Tiles come
in a fixed order: two runs give identical bits.

Legend: N targets, n active rows, M model width, V vocabulary, S rows of a tile, U vocabulary entries of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear_cross_entropy.products import operand_dtype, product

LOG2E = math.log2(math.e)  # PyTorch's exp2 is three times faster than its exp on a CPU
# Logits of a tile: 4 MB of float32 on a CPU (third level cache), 128 MB on a GPU (large products).
TILE = {"cpu": 2**20, "cuda": 2**25}


@dataclass(frozen=True)
class Options:
    """What forward and backward need beside the tensors."""

    ignore_index: int
    chunk_size: int
    softcap: float | None
    dtype: torch.dtype
    """To which hidden and weight are rounded before the product (the autocast dtype)."""


@dataclass(frozen=True)
class _Sweep:
    """Active rows and how their logits are formed."""

    hidden: Tensor
    """``[n, M]`` operand of the products."""
    targets: Tensor
    """``[n]``."""
    weight: Tensor
    bias: Tensor | None
    options: Options
    acc: torch.dtype

    def rows(self) -> Iterator[slice]:
        """Yield blocks of rows."""
        size = self._sizes()[0]
        return (slice(start, start + size) for start in range(0, len(self.targets), size))

    def stripes(self) -> Iterator[slice]:
        """Yield blocks of the vocabulary."""
        size, vocabulary = self._sizes()[1], self.weight.shape[0]
        return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))

    def _sizes(self) -> tuple[int, int]:
        vocabulary, num_rows = self.weight.shape[0], len(self.targets)
        area = min(self.options.chunk_size * vocabulary, TILE.get(self.hidden.device.type, 2**20))
        side = 2 ** (area.bit_length() // 2)
        rows = min(num_rows, max(side, area // vocabulary))
        return rows, min(vocabulary, max(1, area // rows))


def _sweep(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options) -> _Sweep:
    operand = operand_dtype(options.dtype, hidden.device)
    return _Sweep(
        hidden.to(options.dtype).to(operand),
        targets,
        weight,
        bias,
        options,
        torch.promote_types(operand, torch.float32),
    )


def _stripe(sweep: _Sweep, stripe: slice) -> Tensor:
    """Read ``[U, M]`` of the weight as an operand."""
    return sweep.weight[stripe].to(sweep.options.dtype).to(sweep.hidden.dtype)


def _scores(sweep: _Sweep, weight: Tensor, stripe: slice, rows: slice) -> Tensor:
    """Compute the logits of a tile, ``[U, S]``."""
    z = product(weight, sweep.hidden[rows])
    if sweep.bias is not None:
        z.add_(sweep.bias[stripe, None].to(sweep.acc))
    if sweep.options.softcap is not None:
        z.div_(sweep.options.softcap).tanh_().mul_(sweep.options.softcap)
    return z


def _inside(targets: Tensor, stripe: slice) -> tuple[Tensor, Tensor]:
    """Return (entry of the stripe, row) of the targets that lie in it."""
    (row,) = ((targets >= stripe.start) & (targets < stripe.stop)).nonzero(as_tuple=True)
    return targets[row] - stripe.start, row


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Compute losses and log-sum-exps ``[N]``; 0 and 0 at ignored rows."""
    acc = torch.promote_types(options.dtype, torch.float32)
    nll, lse = (torch.zeros(targets.shape, dtype=acc, device=hidden.device) for _ in range(2))
    active = (targets != options.ignore_index).nonzero().squeeze(1)
    if not len(active):
        return nll, lse
    sweep = _sweep(hidden[active], weight, bias, targets[active], options)
    peak = torch.full(active.shape, float("-inf"), dtype=acc, device=hidden.device)
    total, chosen = torch.zeros_like(peak), torch.zeros_like(peak)
    for stripe in sweep.stripes():
        entries = _stripe(sweep, stripe)
        for rows in sweep.rows():
            z = _scores(sweep, entries, stripe, rows)
            entry, row = _inside(sweep.targets[rows], stripe)
            chosen[rows][row] = z[entry, row]
            new = torch.maximum(peak[rows], z.amax(0))
            total[rows] = total[rows] * torch.exp(peak[rows] - new) + z.sub_(new).mul_(LOG2E).exp2_().sum(0)
            peak[rows] = new
    total.log_()
    lse[active] = peak + total
    nll[active] = total + (peak - chosen)  # precise where the target is the peak, however large
    return nll, lse


def backward(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    lse: Tensor,
    grad_nll: Tensor,
    wanted: tuple[bool, bool, bool],
    options: Options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the wanted gradients of hidden, weight and bias: ``dz = (softmax - onehot) g``, times ``1 - tanh^2``."""
    hidden, weight, bias = inputs
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted[0] else None
    active = ((targets != options.ignore_index) & (grad_nll != 0)).nonzero().squeeze(1)
    if not len(active):
        grad_weight = torch.zeros_like(weight) if wanted[1] else None
        return grad_hidden, grad_weight, torch.zeros_like(bias) if bias is not None and wanted[2] else None
    sweep = _sweep(hidden[active], weight, bias, targets[active], options)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    upstream, lse = grad_nll[active].to(sweep.acc), lse[active]
    sum_hidden = torch.zeros(weight.shape[1], len(active), dtype=sweep.acc, device=hidden.device)
    for stripe in sweep.stripes():
        entries = _stripe(sweep, stripe)
        sum_weight = torch.zeros(entries.shape, dtype=sweep.acc, device=hidden.device)
        sum_bias = torch.zeros(len(entries), dtype=sweep.acc, device=hidden.device)
        transposed = entries.t().contiguous()
        for rows in sweep.rows():
            dz = _grad_scores(sweep, entries, stripe, rows, lse, upstream)
            operand = dz.to(sweep.hidden.dtype)
            if wanted[0]:
                sum_hidden[:, rows] += product(transposed, operand.t())
            if wanted[1]:
                sum_weight += product(operand, sweep.hidden[rows].t())
            if wanted[2]:
                sum_bias += dz.sum(1)
        if grad_weight is not None:
            grad_weight[stripe] = sum_weight
        if grad_bias is not None:
            grad_bias[stripe] = sum_bias
    if grad_hidden is not None:
        grad_hidden[active] = sum_hidden.t().to(grad_hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def _grad_scores(sweep: _Sweep, weight: Tensor, stripe: slice, rows: slice, lse: Tensor, upstream: Tensor) -> Tensor:
    z = _scores(sweep, weight, stripe, rows)
    slope = None
    if sweep.options.softcap is not None:
        slope = (z / sweep.options.softcap).square_().neg_().add_(1.0)
    z.sub_(lse[rows]).mul_(LOG2E).exp2_()
    entry, row = _inside(sweep.targets[rows], stripe)
    z[entry, row] -= 1.0
    z.mul_(upstream[rows])
    return z if slope is None else z.mul_(slope)
