"""The tensors of grouped cross attention, and what they must satisfy.

Legend: B batch, N query groups, S rows of a group, H heads, Hk kv heads, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gca.reverse_map import check_reverse


@dataclass(frozen=True)
class Arguments:
    """What every implementation is given."""

    q: Tensor
    """``[B, N, S, H, D]``, a float type."""
    k: Tensor
    """``[B, E, C, Hk, D]`` in the dtype of ``q``, any strides."""
    v: Tensor
    """``[B, E, C, Hk, D]`` likewise."""
    indices: Tensor
    """``[B, N, K]`` int32, chunk of each slot, -1 = empty."""
    weights: Tensor
    """``[B, N, K]`` float32 (float64 with float64 queries)."""
    kv_lengths: Tensor | None
    """``[B, E]`` int32 valid keys of each chunk; None = all."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return the fields in their order."""
        return self.q, self.k, self.v, self.indices, self.weights, self.kv_lengths

    @property
    def group(self) -> int:
        """G, heads a kv head."""
        return self.q.shape[3] // self.k.shape[3]

    def fold_heads(self) -> "Arguments":
        """Turn one retrieval per kv head (indices and weights ``[B, N, Hk, K]``) into B Hk batch rows of one kv head.

        Raises:
            ValueError: on shapes that do not fit.
        """
        heads = self.k.shape[3] if self.k.dim() == 5 else 0
        shapes_fit = self.indices.shape[2] == heads and self.weights.shape == self.indices.shape
        if not shapes_fit or self.q.dim() != 5 or self.q.shape[3] % heads:
            raise ValueError(
                "indices and weights of one retrieval per kv head must be [B, N, Hk, K] beside k [B, E, C, Hk, D], "
                f"got {list(self.indices.shape)}, {list(self.weights.shape)} and {list(self.k.shape)}"
            )
        query = self.q.unflatten(3, (heads, -1)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        key, value = (x.permute(0, 3, 1, 2, 4).flatten(0, 1).unsqueeze(3) for x in (self.k, self.v))
        slots, weights = (x.transpose(1, 2).flatten(0, 1) for x in (self.indices, self.weights))
        lengths = None if self.kv_lengths is None else self.kv_lengths.repeat_interleave(heads, 0)
        return Arguments(query, key, value, slots, weights, lengths)


def check_arguments(arguments: Arguments, reverse: Tensor | None) -> None:
    """Refuse arguments that do not fit together; values are looked at on a CPU only (a GPU would have to be awaited).

    Args:
        arguments: with indices ``[B, N, K]``.
        reverse: int32, as `reverse_index` returns it, or None.

    Raises:
        ValueError: on the first misfit.
    """
    k, indices, kv_lengths = arguments.k, arguments.indices, arguments.kv_lengths
    _check_shapes(*arguments.tensors()[:5])
    _check_types(*arguments.tensors()[:5])
    _check_range("indices", indices, -1, k.shape[1] - 1)
    if kv_lengths is not None:
        if kv_lengths.shape != k.shape[:2] or kv_lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"kv_lengths must be int32 [B, E] = {list(k.shape[:2])}, "
                f"got {kv_lengths.dtype} {list(kv_lengths.shape)}"
            )
        _check_range("kv_lengths", kv_lengths, 0, k.shape[2])
    if reverse is not None:
        check_reverse(reverse, indices, k.shape[1])


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> None:
    if q.dim() != 5 or k.dim() != 5 or k.shape != v.shape or indices.dim() != 3:
        raise ValueError(
            "expected q [B, N, S, H, D], k and v [B, E, C, Hk, D], indices [B, N, K], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {list(indices.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[4] != k.shape[4] or indices.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and indices {list(indices.shape)} "
            "differ in batch, query groups or head size"
        )
    if indices.shape != weights.shape:
        raise ValueError(f"indices and weights differ in shape: {list(indices.shape)} and {list(weights.shape)}")
    if q.shape[3] % k.shape[3]:
        raise ValueError(f"{q.shape[3]} query heads are not a multiple of {k.shape[3]} key/value heads")


def _check_types(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> None:
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    wanted = torch.promote_types(q.dtype, torch.float32)
    if weights.dtype != wanted or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"weights must be {wanted} and indices int32, got {weights.dtype} and {indices.dtype}")
    if len({x.device for x in (q, k, v, indices, weights)}) > 1:
        raise ValueError("q, k, v, indices and weights must be on one device")


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    if values.device.type != "cpu" or not values.numel() or torch.compiler.is_compiling():
        return
    smallest, largest = (int(x) for x in values.aminmax())
    if smallest < low or largest > high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got values from {smallest} to {largest}")
