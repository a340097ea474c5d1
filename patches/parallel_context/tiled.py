"""Attention over grouped keys, one softmax at a time in tiles: exact for every policy, mask and statistic.

Legend: B batch, H heads, b rows and g kv heads of a tile, R query heads of a kv head, c query tokens of a tile, n key
slots of a part, K pieces.
"""

import torch
from torch import Tensor

from patches.parallel_context.options import SelectiveAttention
from patches.parallel_context.policies import MASKED, GroupWeights, selects, weigh_groups
from patches.parallel_context.problem import Attended, Problem, Want, empty_result
from patches.parallel_context.tiles import Tile, TilePart, cut_tiles, multiply


def attend_tiled(problem: Problem, wants: frozenset[Want] = frozenset()) -> Attended:
    """Attend in tiles of queries."""
    if problem.scores is None and problem.selection is not None and problem.selection.aggregate:
        raise AssertionError("aggregated scores span tiles: collect them first")
    result = empty_result(problem, wants)
    detail = problem.selection is not None or bool(wants & {"mass", "group_scores"})
    plain = not detail and not wants and problem.ape is None
    for tile in cut_tiles(problem, detail=detail):
        if plain and tile.parts:
            _attend_plain(problem, tile, result)
        else:
            _attend_tile(problem, tile, result)
    return result


def collect_scores(problem: Problem, top_k: int) -> Tensor:
    """Return the plain scores of all pieces ``[B, H, T, K]``: the sum of the ``top_k`` largest weights (0: mean)."""
    batch, heads, tokens, _ = problem.query.shape
    found = problem.query.new_zeros(batch, heads, tokens, problem.most_pieces, dtype=problem.dtype)
    for tile in cut_tiles(problem, detail=True):
        _store(found, tile, _piece_scores(tile, torch.logsumexp(_group_lse(tile), -1), top_k))
    return found


def _attend_plain(problem: Problem, tile: Tile, result: Attended) -> None:
    """Attend without groups, policy and statistics, in as few operations as decoding needs."""
    parts = [part.logits for part in tile.parts]
    lse = torch.logsumexp(parts[0] if len(parts) == 1 else torch.cat(parts, -1), -1)
    total: Tensor | None = None
    for part in tile.parts:
        weights = part.logits.sub_(lse[..., None]).exp_()
        out = multiply(weights.flatten(2, 3), part.values, problem.dtype)
        total = out if total is None else total.add_(out)
    assert total is not None
    _store(result.output, tile, total.unflatten(2, tile.query.shape[2:4]))
    _store(result.lse, tile, lse)


def _attend_tile(problem: Problem, tile: Tile, result: Attended) -> None:
    selection = problem.selection if selects(problem.selection, tile.num_pieces) else None
    lse = _group_lse(tile)
    scores = _used_scores(problem, tile, lse, selection, result)
    ape = problem.ape
    tempered = None if ape is None else _group_lse(tile, ape.temperature)[..., 1:-1]
    if result.logit_scale is not None or result.cosine is not None:
        _store_logits(problem, tile, result)
    weights = weigh_groups(lse, selection=selection, scores=scores, ape=ape, tempered=tempered)
    temperature = 1.0 if ape is None else ape.temperature
    total = None
    entropy = torch.zeros_like(weights.lse)
    for part in tile.parts:
        spread = _spread(part, weights, temperature, tile.num_groups)
        shape = spread.shape[2:4]
        out = multiply(spread.flatten(2, 3), part.values, problem.dtype).unflatten(2, shape)
        total = out if total is None else total.add_(out)
        if result.entropy is not None:
            entropy += torch.special.entr(spread).sum(-1)
        if result.columns is not None:
            _add_columns(problem, tile, part, spread, result.columns)
    _store(result.output, tile, torch.zeros_like(tile.query) if total is None else total)
    _store(result.lse, tile, weights.lse)
    if result.entropy is not None:
        _store(result.entropy, tile, entropy)
    if result.mass is not None:
        _store(result.mass, tile, weights.mass)


def _spread(part: TilePart, weights: GroupWeights, temperature: float, num_groups: int) -> Tensor:
    """Turn the logits of a part into weights ``exp(x / T_g + offset_g)``, in place: ``[b, g, R, c, n]``."""
    for run in part.runs:
        inside = part.logits[..., run.start : run.stop]
        if temperature != 1.0 and 0 < run.first < num_groups - 1:
            inside.div_(temperature)
        inside.unflatten(-1, (run.count, run.size)).add_(weights.offset[..., run.groups, None])
    return part.logits.exp_()


def _group_lse(tile: Tile, temperature: float = 1.0) -> Tensor:
    """Return the log-sum-exp of every group ``[b, g, R, c, K + 2]``, of logits over ``temperature``."""
    shape, dtype = (*tile.query.shape[:4], tile.num_groups), torch.promote_types(tile.query.dtype, torch.float32)
    lse = torch.full(shape, MASKED, dtype=dtype, device=tile.query.device)
    for part in tile.parts:
        for run in part.runs:
            inside = part.logits[..., run.start : run.stop].unflatten(-1, (run.count, run.size))
            if temperature != 1.0:
                inside = inside / temperature
            # A group in two parts is merged.
            lse[..., run.groups] = torch.logaddexp(lse[..., run.groups], torch.logsumexp(inside, -1))
    return lse


def _piece_scores(tile: Tile, total: Tensor, top_k: int) -> Tensor:
    scores = total.new_zeros(*total.shape, tile.num_groups - 2)
    for part in tile.parts:
        for run in part.runs:
            if run.first in (0, tile.num_groups - 1):
                continue
            inside = part.logits[..., run.start : run.stop].unflatten(-1, (run.count, run.size))
            best = inside if top_k == 0 else inside.topk(min(top_k, run.size), -1).values
            found = (best - total[..., None, None]).exp_()
            scores[..., run.first - 1 : run.first - 1 + run.count] = found.mean(-1) if top_k == 0 else found.sum(-1)
    return scores


def _used_scores(
    problem: Problem, tile: Tile, lse: Tensor, selection: SelectiveAttention | None, result: Attended
) -> Tensor | None:
    """Return the scores that choose the pieces of this tile, and store its own ones where wanted."""
    given = problem.scores
    found = None
    if result.group_scores is not None or (selection is not None and given is None):
        top_k = 5 if problem.selection is None else problem.selection.score_top_k
        found = _piece_scores(tile, torch.logsumexp(lse, -1), top_k)
        if result.group_scores is not None:
            _store(result.group_scores, tile, found)
    if selection is None or given is None:
        return found
    kv_heads = problem.own.keys.shape[1]
    given = given[tile.rows, :, tile.tokens] if given.shape[2] > 1 else given[tile.rows]
    if given.shape[1] == 1:
        return given[:, None]
    return given.unflatten(1, (kv_heads, -1))[:, tile.heads]


def _store_logits(problem: Problem, tile: Tile, result: Attended) -> None:
    """Store the mean |scaled logit| and the mean cosine of queries and keys over the visible keys."""
    count = tile.query.new_zeros(1, dtype=problem.dtype)
    scale, cosine = torch.zeros_like(count), torch.zeros_like(count)
    for part in tile.parts:
        visible = torch.ones_like(part.logits, dtype=torch.bool) if part.hidden is None else ~part.hidden
        visible = visible.expand(part.logits.shape)
        count = count + visible.sum(-1)
        scale = scale + (part.logits.abs() * visible).sum(-1)
        if result.cosine is not None:
            query, keys = (torch.nn.functional.normalize(x.to(problem.dtype), dim=-1) for x in (tile.query, part.keys))
            angles = (query.flatten(2, 3) @ keys.mT).view(part.logits.shape)
            cosine = cosine + (angles * visible).sum(-1)
    if result.logit_scale is not None:
        _store(result.logit_scale, tile, scale / count)
    if result.cosine is not None:
        _store(result.cosine, tile, cosine / count)


def _add_columns(problem: Problem, tile: Tile, part: TilePart, spread: Tensor, columns: Tensor) -> None:
    assert problem.observed is not None
    observed = problem.observed[tile.rows, None, None, tile.tokens, None]
    total = (spread * observed).sum(3)
    kv_heads = problem.own.keys.shape[1]
    target = columns.unflatten(1, (kv_heads, -1))[tile.rows, tile.heads, :, part.column : part.column + total.shape[-1]]
    target.add_(total)


def _store(target: Tensor, tile: Tile, values: Tensor) -> None:
    """Write ``[b, g, R, c, ...]`` into ``[B, H, T, ...]``."""
    kv_heads = target.shape[1] // values.shape[2]
    target.unflatten(1, (kv_heads, -1))[tile.rows, tile.heads, :, tile.tokens] = values.to(target.dtype)
