"""Attention over grouped keys by fused kernels that return their log-sum-exp, merged group by group.

``out = sum_g w_g o_g`` with ``w_g = exp(lse_g + offset_g)``. With ``E_g = scale q . Attention(q, K, K)``, the mean
logit of a group, the entropy follows as ``-sum_g w_g (E_g / T_g + offset_g)``. No logit is ever stored.

Legend: B batch, b rows of a block, H heads, G kv heads, T query tokens, n key slots of a group, D head size, K pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patches.parallel_context.key_groups import Block, Run, find_blocks
from patches.parallel_context.policies import MASKED, weigh_groups
from patches.parallel_context.problem import Attended, Problem, Want, empty_result

HALF = (torch.float16, torch.bfloat16)
SUPPORTED: frozenset[Want] = frozenset({"entropy", "mass"})


def fused_problem(problem: Problem, wants: frozenset[Want]) -> str | None:
    """Say why the fused path cannot serve a problem; None if it can."""
    query = problem.query
    if query.device.type not in ("cpu", "cuda"):
        return f"no fused kernel with a log-sum-exp on {query.device.type}"
    if query.device.type == "cuda" and (query.dtype not in HALF or query.shape[3] > 256 or query.shape[3] % 8):
        return "the fused kernel needs float16 or bfloat16 and a head size that is a multiple of 8, at most 256"
    if problem.softcap is not None:
        return "soft-capped logits have no fused kernel"
    if problem.window is not None:
        return "windows by position need a mask"
    if problem.selection is not None:
        return "selection needs single weights"
    if "entropy" in wants and query.dtype in HALF:
        return "a mean key rounded to half precision moves the entropy by hundredths"
    if not wants <= SUPPORTED:
        return "these statistics need single weights"
    if problem.own.valid is not None or not problem.own.causal or problem.own.keys.shape[2] != query.shape[2]:
        return "own keys that are not exactly the query tokens need a mask"
    if any(part.turned is not None for part in problem.context):
        return "turned queries differ between the parts"
    if any(len(heads) > 1 for part in problem.context for heads in part.counts):
        return "kv heads with different groups need single weights"
    return None


def attend_fused(problem: Problem, wants: frozenset[Want] = frozenset()) -> Attended:
    """Attend by one kernel call per group; groups that are weighed alike go together."""
    result = empty_result(problem, wants)
    detail = "mass" in wants
    blocks = find_blocks(problem.context, problem.num_pieces, problem.own.keys.shape[1], detail=detail)
    for block in blocks:
        _attend_block(problem, block, result, detail=detail)
    return result


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attend by the device's fused kernel.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, G, N, D]``, H a multiple of G.
        value: ``[B, G, N, D]``.
        scale: Factor of the scores.
        causal: Query t sees keys up to t (T = N).

    Returns:
        Output ``[B, H, T, D]`` in the dtype of the query, log-sum-exp ``[B, H, T]`` in float32 or better.
    """
    if query.device.type == "cpu":
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = operation(query, key, value, 0.0, causal, attn_mask=None, scale=scale)
        return output, lse
    operation = torch.ops.aten._scaled_dot_product_flash_attention
    output, lse = operation(query, key, value, 0.0, causal, return_debug_mask=False, scale=scale)[:2]
    return output, lse[..., : query.shape[2]]


@dataclass(frozen=True)
class _KeySet:
    """Keys under one log-sum-exp; column 0 is the prefix, the last column the own tokens."""

    column: int
    keys: Tensor
    values: Tensor
    scale: float
    causal: bool = False


def _attend_block(problem: Problem, block: Block, result: Attended, *, detail: bool) -> None:
    rows, query = block.rows, problem.query[block.rows]
    sets = _key_sets(problem, block, detail=detail)
    columns = (problem.most_pieces if detail else len(sets)) + 2
    lse = torch.full((*query.shape[:3], columns), MASKED, dtype=problem.dtype, device=query.device)
    outputs = {}
    for chosen in sets:
        outputs[chosen.column], lse[..., chosen.column] = softmax_attention(
            query, chosen.keys, chosen.values, scale=chosen.scale, causal=chosen.causal
        )
    ape = problem.ape
    weights = weigh_groups(lse, ape=ape, tempered=None if ape is None else lse[..., 1:-1])
    result.output[rows] = _mix(outputs, weights.mass)
    result.lse[rows] = weights.lse
    if result.mass is not None:
        result.mass[rows] = weights.mass
    if result.entropy is not None:
        for chosen in sets:
            level = _mean_logit(query, chosen) + weights.offset[..., chosen.column]
            result.entropy[rows] -= weights.mass[..., chosen.column] * level


def _key_sets(problem: Problem, block: Block, *, detail: bool) -> list[_KeySet]:
    """Return the sets of keys that need a kernel call each: as few as the policy and the statistics allow."""
    rows, scale = block.rows, problem.scale
    sets: list[_KeySet] = []
    for part, runs in zip(problem.context, block.runs, strict=True):
        keys, values = (_rows(x, rows, len(problem.query[rows])) for x in (part.keys, part.values))
        if runs and not detail and problem.ape is None:
            stop = runs[-1].stop
            sets.append(_KeySet(len(sets) + 1, keys[:, :, :stop], values[:, :, :stop], scale))
            continue
        for group, start, stop in _groups(runs):
            column = group if detail or group == 0 else len(sets) + 1
            tempered = scale if problem.ape is None or group == 0 else scale / problem.ape.temperature
            sets.append(_KeySet(column, keys[:, :, start:stop], values[:, :, start:stop], tempered))
    sets.append(_KeySet(-1, problem.own.keys[rows], problem.own.values[rows], scale, causal=True))
    return sets


def _groups(runs: tuple[Run, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield number, first slot and last slot + 1 of every group."""
    for run in runs:
        for number in range(run.count):
            start = run.start + number * run.size
            yield run.first + number, start, start + run.size


def _rows(x: Tensor, rows: slice, count: int) -> Tensor:
    return x[rows] if x.shape[0] > 1 else x.expand(count, -1, -1, -1)


def _mix(outputs: dict[int, Tensor], mass: Tensor) -> Tensor:
    """Return the outputs weighed by their mass; in one pass where there are two."""
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    if len(outputs) == 2:
        (_, first), (column, second) = outputs.items()
        return torch.lerp(first, second, mass[..., column, None].to(first.dtype))
    total = torch.zeros(next(iter(outputs.values())).shape, dtype=mass.dtype, device=mass.device)
    for column, output in outputs.items():
        total += output * mass[..., column, None]
    return total


def _mean_logit(query: Tensor, chosen: _KeySet) -> Tensor:
    """Return the mean logit ``scale q . Attention(q, K, K)`` of a set of keys ``[b, H, T]``."""
    mean_key, _ = softmax_attention(query, chosen.keys, chosen.keys, scale=chosen.scale, causal=chosen.causal)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.einsum("bhtd,bhtd->bht", query.to(dtype), mean_key.to(dtype)) * chosen.scale
