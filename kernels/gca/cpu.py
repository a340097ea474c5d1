"""Grouped cross attention on a CPU: the choice between plain PyTorch (any device) and compiled C.

The work is done by `tiles.py` or, where a compiler was found and its result passed a check, by `native.py`.

Legend: B batch, N query groups, R = B N, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size, E stored
chunks, C keys of a chunk, K retrieved chunks.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from kernels.gca import native, tiles
from kernels.gca.arguments import Arguments
from kernels.gca.layout import make_plan


@dataclass(frozen=True)
class CPUEngine:
    """Tile by tile, from a numbering of the chunks in use."""

    compiled: bool
    """Whether to use C where it serves."""

    def _steps(self, arguments: Arguments) -> ModuleType:
        return native if self.compiled and native.serves(arguments.q, arguments.k) else tiles

    def statistics_shape(self, arguments: Arguments) -> tuple[int, ...]:
        """Return ``[Hk, R, K, S G]``."""
        batch, num_groups, rows, _, _ = arguments.q.shape
        top_k = arguments.indices.shape[2]
        return arguments.k.shape[3], batch * num_groups, top_k, rows * arguments.group

    def forward(self, arguments: Arguments, scale: float, *, softmax_off_by_one: bool) -> tuple[Tensor, Tensor]:
        """Compute the output ``[B, N, S, H, D]`` in the dtype of q and the log-sum-exps ``[Hk, R, K, S G]``."""
        q, k, v, *_ = arguments.tensors()
        plan, steps = make_plan(arguments), self._steps(arguments)
        out, lse = steps.forward(plan, q, k, v, scale, softmax_off_by_one=softmax_off_by_one)
        return out, lse

    def backward(
        self, arguments: Arguments, _reverse: Tensor | None, grad_out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the gradients of q, k, v and weights from ``grad_out`` ``[B, N, S, H, D]``, in their dtypes."""
        q, k, v, _, weights, _ = arguments.tensors()
        plan, steps = make_plan(arguments), self._steps(arguments)
        grad_q, grad_k, grad_v, grad_weights = steps.backward(plan, grad_out, q, k, v, lse, scale)
        return grad_q, grad_k, grad_v, grad_weights.view(weights.shape).to(weights.dtype)
