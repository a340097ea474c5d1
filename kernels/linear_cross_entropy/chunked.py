"""Per-token loss of a language-model head, tile by tile, forward and backward; any device, no compiler.

Notable: a tile is a block of vocabulary entries (a stripe) times a block of rows. The forward keeps a running
log-sum-exp of every row; the backward recomputes the logits of a tile from it. The vocabulary is the outer loop, so the
weight gradient of a stripe is complete, and rounded once, before the next stripe begins. Tiles come in a fixed order:
two runs give identical bits.

Legend: N targets, n active rows, M model width, V vocabulary, S rows of a tile, U vocabulary entries of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kernels.linear_cross_entropy import tiles
from kernels.linear_cross_entropy.gradients import Gradients
from kernels.linear_cross_entropy.products import add_product, operand_dtype, transposed
from kernels.linear_cross_entropy.tiles import Running, Tile

IGNORED = torch.iinfo(torch.int64).min  # what ignore_index becomes; no target anyone means
# Logits of a tile (8 MB of float32 on a CPU, 128 MB on a GPU) and the entries of a stripe when there are many rows.
TILE = {"cpu": 2**21, "cuda": 2**25}
STRIPE = {"cpu": 512, "cuda": 4096}
Tensors = tuple[Tensor, Tensor, Tensor | None]
"""hidden ``[N, M]``, weight ``[V, M]``, bias ``[V]``."""


@dataclass(frozen=True)
class Options:
    """What forward and backward need beside the tensors."""

    chunk_size: int
    softcap: float | None
    dtype: torch.dtype
    """To which hidden and weight are rounded before the product (the autocast dtype)."""
    keep_rows: bool
    """Whether the forward also computes the gradient of every row of hidden, up to the factor of its loss."""
    fused: bool
    """Whether the tiles are processed by Triton kernels."""

    @property
    def acc(self) -> torch.dtype:
        """Dtype of logits, losses and sums."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def steps(self) -> ModuleType:
        """Module that processes a tile."""
        if not self.fused:
            return tiles
        from kernels.linear_cross_entropy import triton  # optional and slow to import

        return triton


@dataclass(frozen=True)
class _Sweep:
    """Active rows, and how they meet the vocabulary."""

    hidden: Tensor
    """``[n, M]`` operand of the products."""
    targets: Tensor
    """``[n]``."""
    weight: Tensor
    bias: Tensor | None
    options: Options

    def rows(self) -> list[slice]:
        """List the blocks of rows."""
        size, count = self._sizes()[0], len(self.targets)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def stripes(self) -> list[slice]:
        """List the blocks of the vocabulary."""
        size, count = self._sizes()[1], self.weight.shape[0]
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _sizes(self) -> tuple[int, int]:
        device, vocabulary = self.hidden.device.type, self.weight.shape[0]
        area = min(self.options.chunk_size * vocabulary, TILE.get(device, TILE["cpu"]))
        rows = min(len(self.targets), max(1, area // STRIPE.get(device, STRIPE["cpu"])))
        return rows, min(vocabulary, max(1, area // rows))

    def tiles(self, stripe: slice) -> Iterator[tuple[slice, Tile]]:
        """Yield the tiles of a stripe with their rows."""
        entries = self.weight[stripe].to(self.options.dtype).to(self.hidden.dtype)
        bias = None if self.bias is None else self.bias[stripe].to(self.options.acc)
        for rows in self.rows():
            targets = self.targets[rows] - stripe.start
            yield rows, Tile(self.hidden[rows], entries, bias, targets, self.options.softcap)


def _sweep(tensors: Tensors, targets: Tensor, active: Tensor, options: Options) -> _Sweep:
    hidden, weight, bias = tensors
    if len(active) < len(targets):
        hidden, targets = hidden[active], targets[active]
    operand = operand_dtype(options.dtype, hidden.device)
    return _Sweep(hidden.to(options.dtype).to(operand).contiguous(), targets, weight, bias, options)


def forward(tensors: Tensors, targets: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Compute losses and log-sum-exps ``[N]``, 0 at ignored rows, and the rows kept ``[N, M]`` (else empty).

    ``targets`` ``[N]`` int64 hold `IGNORED` where nothing is asked. Results are float32 (float64 for float64 inputs).
    """
    make = {"dtype": options.acc, "device": targets.device}
    nll, lse = torch.zeros(targets.shape, **make), torch.zeros(targets.shape, **make)
    kept = torch.zeros(tensors[0].shape if options.keep_rows else (0,), **make)
    active = (targets != IGNORED).nonzero().squeeze(1)
    if not len(active):
        return nll, lse, kept
    sweep = _sweep(tensors, targets, active, options)
    # A target that is never met (out of range on a GPU) gives NaN.
    running = Running(*(torch.full(active.shape, start, **make) for start in (float("-inf"), 0.0, float("nan"))))
    sums: dict[int, Tensor] = {}
    for stripe in sweep.stripes():
        for rows, tile in sweep.tiles(stripe):
            before = running.peak[rows].clone()
            p = options.steps.accumulate(tile, running[rows], options.keep_rows)
            if p is not None:
                if rows.start in sums:
                    sums[rows.start].mul_(torch.exp(before - running.peak[rows]))
                sums[rows.start] = add_product(sums.get(rows.start), transposed(tile.entries), p.t())
    log_total = running.total.log()
    lse[active] = running.peak + log_total
    nll[active] = log_total + (running.peak - running.chosen)  # precise where the target is the peak, however large
    for rows in sweep.rows() if options.keep_rows else []:
        kept[active[rows]] = _kept_rows(sweep, rows, sums.pop(rows.start), running[rows], nll[active[rows]])
    return nll, lse, kept


def _kept_rows(sweep: _Sweep, rows: slice, total: Tensor, running: Running, nll: Tensor) -> Tensor:
    """Finish ``sum_v (p_v - onehot_v) W_v``; the target's part apart, since ``p - 1`` is only precise as expm1."""
    part = torch.expm1(-nll)
    if sweep.options.softcap is not None:
        part *= 1.0 - (running.chosen / sweep.options.softcap) ** 2
    chosen = sweep.weight[sweep.targets[rows]].to(sweep.options.dtype).to(sweep.options.acc)
    return total.div_(running.total).t().addcmul(part[:, None], chosen)


def backward(
    tensors: Tensors, targets: Tensor, lse: Tensor, grad_nll: Tensor, wanted: tuple[bool, ...], options: Options
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the wanted gradients of hidden ``[N, M]``, weight ``[V, M]`` and bias ``[V]``, in their dtypes.

    Args:
        tensors: hidden, weight and bias.
        targets: ``[N]`` int64, `IGNORED` where nothing was asked.
        lse: ``[N]`` of `forward`.
        grad_nll: ``[N]``, upstream gradients g of ``dz = (softmax - onehot) g``.
        wanted: which of the three.
        options: those of `forward`.
    """
    active = ((targets != IGNORED) & (grad_nll != 0)).nonzero().squeeze(1)
    gradients = Gradients(tensors, wanted, active, options.dtype)
    if not len(active):
        return gradients.results()
    sweep = _sweep(tensors, targets, active, options)
    upstream, lse = gradients.scale(grad_nll[active].to(options.acc), sweep.hidden.dtype), lse[active]
    for stripe in sweep.stripes():
        for rows, tile in sweep.tiles(stripe):
            gradients.add(tile, rows, options.steps.differentiate(tile, lse[rows], upstream[rows]))
        gradients.finish(stripe)
    return gradients.results()
