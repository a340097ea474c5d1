"""Sums of the gradients over the tiles of a sweep, in float32, rounded once when a stripe or the sweep is complete.

Notable: a CPU with bfloat16 products forms bfloat16 gradients with them, in half the time, although they round their
results to bfloat16. The targets' own entries, which carry most of a gradient, are left out of those products and added
in float32, so that the roundings together stay near the one rounding of the result.

Legend: N targets, n active rows, M model width, V vocabulary, S rows of a tile, U vocabulary entries of a tile.
"""

import torch
from torch import Tensor

from kernels.linear_cross_entropy.products import add_product, multiplies_bfloat16, rounded_product, transposed
from kernels.linear_cross_entropy.tiles import Tile

# Logits below which the products take no time that matters, and float32 ones are used.
SMALL = 2**20


class Gradients:
    """The wanted gradients of hidden ``[N, M]``, weight ``[V, M]`` and bias ``[V]``."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        wanted: tuple[bool, ...],
        active: Tensor,
        dtype: torch.dtype,
    ) -> None:
        hidden, weight, bias = tensors
        self.active, self.shape, self.dtype = active, hidden.shape, hidden.dtype
        make = torch.empty if len(active) else torch.zeros
        self.wants_hidden = wanted[0]
        self.weight = make(weight.shape, dtype=weight.dtype, device=weight.device) if wanted[1] else None
        self.bias = make(bias.shape, dtype=bias.dtype, device=bias.device) if bias is not None and wanted[2] else None
        large = len(active) * len(weight) >= SMALL
        native = large and dtype == torch.bfloat16 and multiplies_bfloat16(active.device)
        self.fast_hidden = native and wanted[0] and hidden.dtype == dtype
        self.fast_weight = native and wanted[1] and weight.dtype == dtype
        self.rows: dict[int, Tensor] = {}
        """Sum ``[M, S]`` of each block of rows of hidden."""
        self.operands: dict[int, Tensor] = {}
        """The blocks of hidden as ``[M, S]``."""
        self.stripe: Tensor | None = None
        """Sum ``[U, M]`` of the stripe of the weight."""
        self.stripe_bias: Tensor | None = None
        self.unscale: Tensor | float = 1.0

    def scale(self, upstream: Tensor, operand: torch.dtype) -> Tensor:
        """Bring the upstream gradients ``[n]`` into the range of float16 operands, by a power of two."""
        if operand != torch.float16:
            return upstream
        factor = torch.exp2(14.0 - upstream.abs().amax().log2().ceil())
        self.unscale = 1.0 / factor
        return upstream * factor

    def add(self, tile: Tile, rows: slice, dz: Tensor) -> None:
        """Add a tile's part, of its ``dz`` ``[U, S]``: ``dh = dz^T W``, ``dW = dz h``, ``db = sum dz``, in float32."""
        if self.fast_hidden or self.fast_weight:
            self._add_rounded(tile, rows, dz)
        operand = dz.to(tile.hidden.dtype)
        if self.wants_hidden and not self.fast_hidden:
            self.rows[rows.start] = add_product(self.rows.get(rows.start), transposed(tile.entries), operand.t())
        if self.weight is not None and not self.fast_weight:
            if rows.start not in self.operands:
                self.operands[rows.start] = transposed(tile.hidden)
            self.stripe = add_product(self.stripe, operand, self.operands[rows.start])
        if self.bias is not None:
            part = dz.sum(1, dtype=torch.promote_types(dz.dtype, torch.float32))
            self.stripe_bias = part if self.stripe_bias is None else self.stripe_bias.add_(part)

    def _add_rounded(self, tile: Tile, rows: slice, dz: Tensor) -> None:
        (row,) = tile.inside().nonzero(as_tuple=True)
        entry, target = tile.targets[row], tile.read(dz)[row, None]
        rest = dz.bfloat16()
        tile.write(rest, 0.0)
        if self.fast_hidden:
            part = rounded_product(tile.entries.bfloat16().t(), rest.t())
            total = self.rows.get(rows.start)
            total = part.float() if total is None else total.add_(part)
            self.rows[rows.start] = total.index_add_(1, row, (tile.entries[entry] * target).t())
        if self.fast_weight:
            part = rounded_product(rest, tile.hidden.bfloat16().t())
            self.stripe = part.float() if self.stripe is None else self.stripe.add_(part)
            self.stripe.index_add_(0, entry, tile.hidden[row] * target)

    def finish(self, stripe: slice) -> None:
        """Round the sums of a stripe."""
        for result, total in ((self.weight, self.stripe), (self.bias, self.stripe_bias)):
            if result is not None and total is not None:
                result[stripe] = total * self.unscale if isinstance(self.unscale, Tensor) else total
        self.stripe = self.stripe_bias = None

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Round the sums of the rows and return the gradients of hidden, weight and bias."""
        if not self.wants_hidden:
            return None, self.weight, self.bias
        hidden = torch.zeros(self.shape, dtype=self.dtype, device=self.active.device)
        for start in sorted(self.rows):
            total = self.rows.pop(start)  # its memory is free for the next
            hidden[self.active[start : start + total.shape[1]]] = (total * self.unscale).t().to(self.dtype)
        return hidden, self.weight, self.bias
