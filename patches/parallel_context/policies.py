"""How the groups of a softmax are weighed: plain, hard or soft selection, adaptive temperature.

Every policy keeps the form ``weight_j = exp(x_j / T_g + offset_g)`` for a key j of group g with logit x_j; only the
offsets (and T on the pieces) differ. Offsets follow from the log-sum-exps of the groups alone.

Legend: H heads, T query tokens, K pieces, L layers. Groups are 0 prefix, 1 .. K pieces, K + 1 own tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from patches.parallel_context.options import APE, SelectiveAttention

MASKED = -1e30
"""Logit of an invisible key: finite, so that a group without a visible key makes no NaN."""
EMPTY = -1e29
"""Log-sum-exps below this belong to groups without a visible key."""
DIMENSIONS = {"layer": -4, "head": -3, "query": -2}


@dataclass(frozen=True)
class GroupWeights:
    """The weights of all keys, by group: ``exp(x / temperature + offset)``."""

    offset: Tensor
    """``[..., K + 2]``, -inf for groups that are left out."""
    mass: Tensor
    """Sum of the weights of each group ``[..., K + 2]``."""
    lse: Tensor
    """``[...]``, log-sum-exp of what is left."""


def aggregate_scores(scores: Tensor, dims: Iterable[str], top_k: int) -> Tensor:
    """Share scores over dimensions: the sum of the ``top_k`` largest of the named ones flattened together (0: mean).

    Args:
        scores: ``[..., H, T, K]``; "layer" is dimension -4.
        dims: Names of "layer", "head", "query".
        top_k: Scores summed; 0: their mean.

    Returns:
        The same number of dimensions, the named ones of size 1.

    Raises:
        ValueError: On another name, or "layer" without that dimension.
    """
    names = list(dims)
    for name in names:
        if name not in DIMENSIONS or scores.dim() < -DIMENSIONS[name]:
            raise ValueError(f"cannot aggregate over {name!r} of scores {list(scores.shape)}, use layer, head or query")
    if not names:
        return scores
    axes = sorted(scores.dim() + DIMENSIONS[name] for name in names)
    others = [axis for axis in range(scores.dim()) if axis not in axes]
    flat = scores.permute(*others, *axes).flatten(len(others))
    total = flat.mean(-1) if top_k == 0 else flat.topk(min(top_k, flat.shape[-1]), -1).values.sum(-1)
    for axis in axes:
        total = total.unsqueeze(axis)
    return total


def choose_pieces(scores: Tensor, top_k: int) -> Tensor:
    """Mark the ``top_k`` best pieces of ``[..., K]`` (ties: the lower number) with True."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def selects(selection: SelectiveAttention | None, num_pieces: int) -> bool:
    """Say whether a selection has an effect on this many pieces."""
    return selection is not None and not selection.keeps_all(num_pieces)


def weigh_groups(
    lse: Tensor,
    *,
    selection: SelectiveAttention | None = None,
    scores: Tensor | None = None,
    ape: APE | None = None,
    tempered: Tensor | None = None,
) -> GroupWeights:
    """Turn the log-sum-exps of the groups into their weights.

    Args:
        lse: ``[..., K + 2]`` of the plain logits.
        selection: A selection that has an effect, or None.
        scores: Aggregated scores of the pieces ``[..., K]``, with a selection.
        ape: Adaptive temperature.
        tempered: ``[..., K]`` of the logits over the temperature, with ``ape``.
    """
    if selection is not None and selection.soft_temperature is not None:
        assert scores is not None
        return _soft(lse, selection, selection.soft_temperature, scores)
    alive = lse > EMPTY
    if selection is not None:
        assert scores is not None
        chosen = choose_pieces(scores.expand_as(lse[..., 1:-1]), selection.top_k)
        alive[..., 1:-1] &= chosen
    if ape is not None:
        assert tempered is not None
        return _adaptive(lse, alive, ape, tempered)
    total = torch.logsumexp(lse.masked_fill(~alive, MASKED), -1)
    offset = (-total)[..., None].expand_as(lse).masked_fill(~alive, float("-inf"))
    return GroupWeights(offset, (lse + offset).exp(), total)


def _adaptive(lse: Tensor, alive: Tensor, ape: APE, tempered: Tensor) -> GroupWeights:
    """``lse_c = S T logsumexp(x / T)`` over the pieces, merged with the plain log-sum-exp of prefix and own tokens."""
    inside = torch.logsumexp(tempered.masked_fill(~alive[..., 1:-1], MASKED), -1)
    # Without a visible piece the factor S T must not lift the mark of emptiness.
    context = torch.where(inside > EMPTY, ape.scale * ape.temperature * inside, MASKED)
    rest = torch.logsumexp(lse[..., [0, -1]], -1)
    total = torch.logaddexp(context, rest)
    offset = (-total)[..., None].repeat_interleave(lse.shape[-1], -1)
    offset[..., 1:-1] += (context - inside)[..., None]
    offset.masked_fill_(~alive, float("-inf"))
    level = torch.cat([lse[..., :1], tempered, lse[..., -1:]], -1)
    return GroupWeights(offset, (level + offset).exp(), total)


def _soft(lse: Tensor, selection: SelectiveAttention, temperature: float, scores: Tensor) -> GroupWeights:
    """Give piece m the share softmax_m(log(s + 1e-5) / temperature) of the mass on the pieces (or of 1)."""
    total = torch.logsumexp(lse, -1, keepdim=True)
    mass = (lse - total).exp()
    alive = lse > EMPTY
    share = ((scores + 1e-5).log() / temperature).expand_as(lse[..., 1:-1])
    share = torch.softmax(share.masked_fill(~alive[..., 1:-1], MASKED), -1)
    if selection.soft_mass == "context":
        share = share * mass[..., 1:-1].sum(-1, keepdim=True)
    mass[..., 1:-1] = torch.where(alive[..., 1:-1], share, 0.0)
    offset = torch.where(alive, mass.log() - lse, float("-inf"))
    return GroupWeights(offset, mass, total.squeeze(-1))
