"""Which key-value slots to keep: SnapKV, H2O, StreamingLLM, PyramidKV and a random control.

Legend: B batch, H heads, G kv heads, O observed queries, N key slots, D head size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patches.parallel_context.checks import check_choice, check_count, check_flag

BLOCK = 2**20
"""Attention weights held at a time."""
METHODS = ("snapkv", "h2o", "streaming", "pyramidkv", "random")


def observation_scores(
    query: Tensor, key: Tensor, *, scale: float, start: int, stop: int, kernel: int = 7, pool: str = "max"
) -> Tensor:
    """Score slots by the attention that the last queries pay them.

    ``softmax(scale q . k)`` over all visible keys, summed over the rows, the columns [start, stop) pooled along the
    slots inside that range, then the mean over the query heads of a kv head.

    Args:
        query: ``[B, H, O, D]``, the rows of the last O of the N keys (causal, lower right).
        key: ``[B, G, N, D]``, G-headed throughout.
        scale: Factor of the scores.
        start: First slot scored.
        stop: Slot after the last one scored.
        kernel: Width of the pooling, odd.
        pool: "max", or "mean" over the slots really covered at the borders.

    Returns:
        ``[B, G, stop - start]``, float32 or better.
    """
    return pool_scores(observed_attention(query, key, scale, start, stop), kernel, pool).mean(2)


def observed_attention(query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """Return the attention of the queries on slots [start, stop), summed over the rows: ``[B, G, R, stop - start]``.

    R = H / G query heads share a kv head. Rows are taken in blocks, so that memory stays linear in O and N.
    """
    acc = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(acc)
    num_queries, num_keys = query.shape[2], key.shape[2]
    rows = query.to(acc).unflatten(1, (key.shape[1], -1)) * scale  # [B, G, R, O, D]
    total = rows.new_zeros(*rows.shape[:3], stop - start)
    block = max(1, BLOCK // (rows.shape[0] * rows.shape[1] * rows.shape[2] * num_keys))
    for first in range(0, num_queries, block):
        part = rows[:, :, :, first : first + block]
        seen = num_keys - num_queries + first + part.shape[3]
        logits = torch.einsum("bgrod,bgnd->bgron", part, keys[:, :, :seen])
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=key.device).triu(seen - part.shape[3] + 1)
        weights = torch.softmax(logits.masked_fill_(future, float("-inf")), -1).sum(3)
        last = min(seen, stop)
        if last > start:
            total[..., : last - start] += weights[..., start:last]
    return total


def pool_scores(scores: Tensor, kernel: int, pool: str) -> Tensor:
    """Pool scores ``[..., N]`` with stride 1 and borders that keep N ("mean": over the covered slots)."""
    if kernel == 1 or not scores.shape[-1]:
        return scores
    flat = scores.reshape(1, -1, scores.shape[-1])
    if pool == "max":
        pooled = torch.nn.functional.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    else:
        pooled = torch.nn.functional.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
    return pooled.view(scores.shape)


def best_slots(scores: Tensor, count: int) -> Tensor:
    """Return the indices ``[..., count]`` of the largest of scores ``[..., N]``, ascending; ties keep the earlier."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values


def pyramid_budgets(capacity: int, num_layers: int, *, beta: int = 20, length: int | None = None) -> list[int]:
    """Spread a mean capacity over the layers, most below, least on top, in equal steps.

    Args:
        capacity: Mean slots per layer.
        num_layers: Layers of the model.
        beta: The top layer gets capacity // beta.
        length: Slots there are; the bottom layer gets no more.
    """
    if num_layers == 1:
        return [capacity]
    low = capacity // beta
    high = 2 * capacity - low
    if length is not None and length < high:
        high, low = length, 2 * capacity - length
    step = (high - low) // (num_layers - 1)
    return [high - layer * step for layer in range(num_layers)]


@dataclass(frozen=True)
class TokenEviction:
    """Keep `capacity` slots of the pieces per kv head; prefix, query and generated tokens always stay."""

    method: Literal["snapkv", "h2o", "streaming", "pyramidkv", "random"] = "snapkv"
    capacity: int = 512
    observation: int = 8
    """Last rows whose attention scores the slots."""
    kernel: int = 7
    """Slots pooled together, odd."""
    pool: Literal["max", "mean"] = "max"
    stage: Literal["piece", "query"] = "piece"
    """"piece": `capacity` slots of every piece, while encoding; "query": of all pieces together, after the query."""
    observe: Literal["query", "piece"] = "query"
    """Whose rows are observed at stage "piece"; "piece" needs no query."""
    dynamic: bool = False
    """Drop the weakest slot after every decoded token (stage "query")."""
    sinks: int = 4
    """First slots that "streaming" keeps."""
    beta: int = 20
    """Steepness of "pyramidkv"."""
    seed: int = 0
    """Seed of "random"."""
    rerotate: bool = True
    """Whether "streaming" measures the distance to the sinks inside the cache."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        for name in ("capacity", "observation", "kernel", "beta"):
            check_count(name, getattr(self, name))
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that pooled slots stay in place, got {self.kernel}")
        check_choice("pool", self.pool, ("max", "mean"))
        check_choice("stage", self.stage, ("piece", "query"))
        check_choice("observe", self.observe, ("query", "piece"))
        check_flag("dynamic", self.dynamic)
        check_flag("rerotate", self.rerotate)
        check_count("sinks", self.sinks, 0)
        check_count("seed", self.seed, 0)
        if self.method == "streaming" and self.sinks >= self.capacity:
            raise ValueError(f"streaming needs sinks below capacity = {self.capacity}, got {self.sinks}")
        if self.dynamic and self.stage != "query":
            raise ValueError("dynamic eviction acts while decoding: set stage='query'")
        if self.dynamic and self.method == "streaming":
            raise ValueError("streaming moves its window by itself: leave dynamic out")
        if self.stage == "query" and self.observe != "query":
            raise ValueError("stage='query' observes the query's rows: leave observe='query'")

    @property
    def needs_query(self) -> bool:
        """Whether encoding needs the query."""
        return self.stage == "piece" and self.observe == "query" and self.method in ("snapkv", "h2o", "pyramidkv")

    def budget(self, layer: int = 0, num_layers: int = 1, length: int | None = None) -> int:
        """Return the slots that layer ``layer`` keeps of ``length``."""
        if self.method != "pyramidkv":
            return self.capacity
        return pyramid_budgets(self.capacity, num_layers, beta=self.beta, length=length)[layer]

    def keep(
        self, query: Tensor, key: Tensor, *, scale: float, start: int, stop: int, layer: int = 0, num_layers: int = 1
    ) -> Tensor:
        """Choose the slots of [start, stop) to keep.

        Args:
            query: ``[B, H, O, D]``, the rows of the last O of the N keys.
            key: ``[B, G, N, D]``.
            scale: Factor of the scores.
            start: First candidate.
            stop: Slot after the last candidate.
            layer: Number of this layer ("pyramidkv", "random").
            num_layers: Layers of the model ("pyramidkv").

        Returns:
            Slots ``[B, G, n]`` int64, ascending; all of them if the budget covers them.
        """
        budget, length = self.budget(layer, num_layers, stop - start), stop - start
        if budget >= length or self.method in ("random", "streaming"):
            scores = query.new_zeros(key.shape[0], key.shape[1], length, dtype=torch.float32)
        elif self.method == "h2o":
            scores = observation_scores(query, key, scale=scale, start=start, stop=stop, kernel=1)
        else:
            observed = query[:, :, -self.observation :]
            scores = observation_scores(
                observed, key, scale=scale, start=start, stop=stop, kernel=self.kernel, pool=self.pool
            )
        return self.choose(scores, budget, layer) + start

    def choose(self, scores: Tensor, budget: int, layer: int = 0) -> Tensor:
        """Choose ``budget`` of the scored slots ``[B, G, length]``: indices ``[B, G, n]``, ascending."""
        length = scores.shape[-1]
        every = torch.arange(length, device=scores.device).expand(scores.shape)
        if budget >= length:
            return every
        if self.method == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            draws = torch.rand(scores.shape[1:], generator=generator)  # the same for every row of a batch
            return best_slots(draws, budget).to(scores.device).expand(len(scores), -1, -1)
        if self.method == "streaming":
            return torch.cat([every[..., : self.sinks], every[..., length - budget + self.sinks :]], -1)
        if self.method == "h2o":
            recent = budget - budget // 2
            heavy = best_slots(scores[..., : length - recent], budget // 2)
            return torch.cat([heavy, every[..., length - recent :]], -1)
        return best_slots(scores, budget)
