"""Grouped attention written densely: one logit matrix, one weight per key, no tricks. For tests and small inputs.

Legend: B batch, H heads, G kv heads, T query tokens, N key slots, D head size, K pieces.
"""

import torch
from torch import Tensor

from patches.parallel_context.options import APE, SelectiveAttention
from patches.parallel_context.policies import aggregate_scores, choose_pieces, selects


def dense_grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    scale: float,
    selection: SelectiveAttention | None = None,
    ape: APE | None = None,
    softcap: float | None = None,
    scores: Tensor | None = None,
    own: int | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `attention.grouped_attention` by its definition; the same arguments, no checks.

    ``hidden`` ``[B, H, T, N]`` hides single keys from single queries, as a window does.

    Returns:
        Output ``[B, H, T, D]``, log-sum-exp of the plain logits ``[B, H, T]``, entropy ``[B, H, T]``, group scores
        ``[B, H, T, K]``, mass ``[B, H, T, K + 2]``, in float32 or better.
    """
    acc = torch.promote_types(query.dtype, torch.float32)
    repeat = query.shape[1] // key.shape[1]
    keys, values = (x.to(acc).repeat_interleave(repeat, 1) for x in (key, value))
    ids = segments.expand(*key.shape[:3]) if segments.dim() != 2 else segments[:, None].expand(*key.shape[:3])
    ids = ids.repeat_interleave(repeat, 1)[:, :, None]  # [B, H, 1, N]
    visible = _visible(ids, query.shape[2], query.shape[2] if own is None else own)
    if hidden is not None:
        visible = visible & ~hidden

    logits = scale * torch.einsum("bhtd,bhnd->bhtn", query.to(acc), keys)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    plain = torch.softmax(logits.masked_fill(~visible, float("-inf")), -1).nan_to_num()
    num_pieces = int(segments.max().clamp_min(0))
    groups = [ids == number for number in range(num_pieces + 1)] + [(ids == -1).expand_as(visible)]
    found = plain.new_zeros(*plain.shape[:3], num_pieces)
    for number in range(num_pieces):
        found[..., number] = _score(plain, groups[number + 1], 5 if selection is None else selection.score_top_k)
    groups = [group & visible for group in groups]
    used = scores
    if used is None and selection is not None:
        used = aggregate_scores(found, selection.aggregate, selection.aggregate_top_k)
    rows = []
    for b, number in enumerate(int(row.max().clamp_min(0)) for row in ids.flatten(1)):
        chosen = None if used is None else used.expand(found.shape)[b, ..., :number]
        own_groups = [group[b] for group in [*groups[: number + 1], groups[-1]]]
        rows.append(_weights(logits[b], own_groups, selection if selects(selection, number) else None, chosen, ape))
    weights = torch.stack(rows)
    out = torch.einsum("bhtn,bhnd->bhtd", weights, values)
    mass = torch.stack([(weights * group).sum(-1) for group in groups], -1)
    lse = torch.logsumexp(logits.masked_fill(~visible, float("-inf")), -1)
    return out, lse, torch.special.entr(weights).sum(-1), found, mass


def _visible(ids: Tensor, num_tokens: int, own: int) -> Tensor:
    """Say which keys ``[B, H, T, N]`` are visible: the last ``own`` ones causally (lower right)."""
    num_keys = ids.shape[-1]
    slot = torch.arange(num_keys, device=ids.device)
    future = slot > torch.arange(num_tokens, device=ids.device)[:, None] + num_keys - num_tokens
    return (ids != -2) & ~(future & (slot >= num_keys - own))


def _score(weights: Tensor, group: Tensor, top_k: int) -> Tensor:
    inside = weights * group
    if top_k == 0:
        return inside.sum(-1) / group.sum(-1).clamp_min(1)
    return inside.topk(min(top_k, inside.shape[-1]), -1).values.sum(-1)


def _weights(
    logits: Tensor,
    groups: list[Tensor],
    selection: SelectiveAttention | None,
    scores: Tensor | None,
    ape: APE | None,
) -> Tensor:
    """Return the weights ``[H, T, N]`` of one row and its groups."""
    none = torch.zeros_like(groups[0])
    rest = groups[0] | groups[-1]
    pieces = list(groups[1:-1])
    if selection is not None and selection.soft_temperature is None:
        assert scores is not None
        chosen = choose_pieces(scores, selection.top_k)
        pieces = [group & chosen[..., number, None] for number, group in enumerate(pieces)]
    context = torch.stack(pieces).any(0) if pieces else none
    if ape is None or not pieces:
        plain = torch.softmax(logits.masked_fill(~(rest | context), float("-inf")), -1).nan_to_num()
    else:
        inside = logits / ape.temperature
        inside_lse = torch.logsumexp(inside.masked_fill(~context, float("-inf")), -1, keepdim=True)
        rest_lse = torch.logsumexp(logits.masked_fill(~rest, float("-inf")), -1, keepdim=True)
        context_lse = ape.scale * ape.temperature * inside_lse
        total = torch.logaddexp(context_lse, rest_lse)
        return (inside - inside_lse + context_lse - total).exp() * context + (logits - total).exp() * rest
    if selection is None or selection.soft_temperature is None:
        return plain
    assert scores is not None
    alive = torch.stack([group.any(-1) for group in pieces], -1)
    share = (torch.log(scores + 1e-5) / selection.soft_temperature).masked_fill(~alive, float("-inf"))
    share = torch.softmax(share, -1).nan_to_num()
    if selection.soft_mass == "context":
        share = share * (plain * context).sum(-1, keepdim=True)
    weights = plain * rest
    for number, group in enumerate(pieces):
        weights = weights + share[..., number, None] * _normalised(logits, group)
    return weights


def _normalised(logits: Tensor, group: Tensor) -> Tensor:
    return torch.softmax(logits.masked_fill(~group, float("-inf")), -1).nan_to_num()
