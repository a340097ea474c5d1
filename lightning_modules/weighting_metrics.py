"""Sums that describe a weighted step, and what is logged of them.

Notable: everything but the maximum is a sum, so micro-batches and ranks add up and the host looks only when it logs.

Letters: B batch, T targets, K position buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.position_loss import bucket_nll

Sums = dict[str, Tensor]
_MAXIMUM = "weight_max"


def weighting_sums(
    nll: Tensor, base_nll: Tensor | None, weights: Tensor, valid: Tensor, *, edges: Sequence[int]
) -> Sums:
    """Describe a micro-batch by detached float64 sums.

    Args:
        nll: float32 [B, T], loss of every target with its full context.
        base_nll: float32 [B, T], with the short context; NaN where there is no score; None without scoring.
        weights: float32 [B, T].
        valid: bool [B, T].
        edges: K + 1 increasing positions; a bucket holds the targets at ``edges[k] <= position < edges[k + 1]``.

    Returns:
        float64 scalars, and ``bucket_nll``, ``bucket_targets`` [K].
    """
    nll = torch.where(valid, nll.detach(), 0).double()
    weights = torch.where(valid, weights, 0).double()
    scored = torch.zeros_like(valid) if base_nll is None else valid & ~base_nll.isnan()
    gap = torch.zeros_like(nll) if base_nll is None else torch.where(scored, nll - base_nll.double(), 0)
    bucket_sums, bucket_counts = bucket_nll(nll, valid, edges)
    return {
        "num_targets": valid.sum().double(),
        "nll": nll.sum(),
        "weighted_nll": (weights * nll).sum(),
        "weight": weights.sum(),
        "weight_square": weights.square().sum(),
        "zero_weights": (valid & (weights == 0)).sum().double(),
        "num_scored": scored.sum().double(),
        "gap": gap.sum(),
        "bucket_nll": bucket_sums.double(),
        "bucket_targets": bucket_counts.double(),
        _MAXIMUM: weights.max(),
    }


def add_sums(total: Sums | None, more: Sums) -> Sums:
    """Add the sums of two micro-batches; the maximum is the greater one."""
    if total is None:
        return more
    return {
        name: torch.maximum(total[name], value) if name == _MAXIMUM else total[name] + value
        for name, value in more.items()
    }


def reduce_sums(sums: Sums) -> Sums:
    """Add the sums over all processes: one collective for the sums, one for the maximum."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    names = [name for name in sums if name != _MAXIMUM]
    flat = torch.cat([sums[name].reshape(-1) for name in names])
    highest = sums[_MAXIMUM].clone()
    torch.distributed.all_reduce(flat)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    parts = flat.split([sums[name].numel() for name in names])
    return {name: part.reshape(sums[name].shape) for name, part in zip(names, parts, strict=True)} | {_MAXIMUM: highest}


def weighting_report(sums: Sums, *, edges: Sequence[int]) -> dict[str, float]:
    """Turn the sums of a step into the numbers to log, beside the weighted loss; a bucket without targets has none."""
    plain = {name: value.tolist() for name, value in sums.items()}
    n = plain["num_targets"]
    if not n:
        return {}
    mean = plain["weight"] / n
    report = {
        "ce": plain["nll"] / n,
        "weight_mean": mean,
        "weight_std": math.sqrt(max(plain["weight_square"] / n - mean**2, 0.0)),
        "weight_max": plain[_MAXIMUM],
        "weight_zero_share": plain["zero_weights"] / n,
        "weight_effective_share": plain["weight"] ** 2 / (n * plain["weight_square"])
        if plain["weight_square"]
        else 0.0,
        "unscored_share": 1 - plain["num_scored"] / n,
    }
    if plain["num_scored"]:
        report["long_short_gap"] = plain["gap"] / plain["num_scored"]
    buckets = zip(edges, edges[1:], plain["bucket_nll"], plain["bucket_targets"], strict=False)
    return report | {f"ce_{a}_{b}": nll / count for a, b, nll, count in buckets if count}
