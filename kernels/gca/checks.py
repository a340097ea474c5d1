"""What the arguments of grouped cross attention must satisfy.

Legend: B batch, N query groups, S rows of a group, H heads, Hk kv heads, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

import torch
from torch import Tensor

from kernels.gca.reverse_map import check_reverse


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    *,
    reverse: Tensor | None,
) -> None:
    """Refuse arguments that do not fit together; values are looked at on a CPU only (a GPU would have to be awaited).

    Raises:
        ValueError: on the first misfit.
    """
    _check_shapes(q, k, v, indices, weights)
    _check_types(q, k, v, indices, weights)
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
