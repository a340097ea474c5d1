"""Frozen retrievers: which earlier chunks are neighbours of a chunk, decided from their tokens alone.

Each is a pure function of the tokens of a chunk and of the chunks it may see, so it is deterministic, does not care
whether a sequence arrives at once or in pieces, and cannot look into the future.

Legend: B batch, N chunks, S tokens of a chunk, K neighbours, U different tokens of a sequence.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Retriever(Protocol):
    """What finds neighbours."""

    def __call__(self, chunk_tokens: Tensor, top_k: int, visible: Tensor) -> Tensor:
        """Return the neighbours of every chunk.

        Args:
            chunk_tokens: ``[B, N, S]`` int64.
            top_k: K.
            visible: ``[B, N, 2]``: chunk c may have neighbours ``visible[b, c, 0] .. visible[b, c, 1] - 1``.

        Returns:
            ``[B, N, K]`` int32, best first, -1 = none.
        """
        ...


def best_visible(scores: Tensor, top_k: int, visible: Tensor) -> Tensor:
    """Return the ``top_k`` visible chunks of largest score; ties go to the earlier chunk.

    Args:
        scores: ``[B, N, N]``; -inf (or the smallest integer) = never.
        top_k: K.
        visible: ``[B, N, 2]``.

    Returns:
        ``[B, N, K]`` int32, -1 where there are fewer.
    """
    number = torch.arange(scores.shape[2], device=scores.device)
    never = float("-inf") if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    hidden = (number < visible[..., :1]) | (number >= visible[..., 1:])
    order = scores.masked_fill(hidden, never).sort(dim=-1, descending=True, stable=True)
    found = torch.where(order.values > never, order.indices, -1)[..., :top_k]
    return F.pad(found, (0, top_k - found.shape[-1]), value=-1).int()


class BM25Retriever:
    """Okapi BM25 over token ids; needs no weights.

    ``s(c, e) = sum over tokens w of c of idf_c(w) f (k1 + 1) / (f + k1)`` with f the count of w in e (all chunks are
    equally long, so there is no length term) and ``idf_c(w) = log(1 + (n - d + 1/2) / (d + 1/2))``, where n chunks are
    visible to c and d of them hold w. Statistics of the visible chunks only: what comes later changes no score.

    Args:
        k1: How fast repeated tokens stop to count.

    Raises:
        ValueError: k1 is not above 0.
    """

    def __init__(self, k1: float = 1.2) -> None:
        if not k1 > 0:
            raise ValueError(f"k1 must be above 0, got {k1}")
        self.k1 = k1

    def __call__(self, chunk_tokens: Tensor, top_k: int, visible: Tensor) -> Tensor:
        """Return the neighbours ``[B, N, K]``; chunks that share no token are none. See `Retriever`."""
        rows = zip(chunk_tokens, visible.to(chunk_tokens.device), strict=True)
        return best_visible(torch.stack([self._scores(*row) for row in rows]), top_k, visible)

    def _scores(self, chunks: Tensor, visible: Tensor) -> Tensor:
        """Score ``[N, N]`` float64 the chunks ``[N, S]`` of one sequence."""
        tokens, place = torch.unique(chunks, return_inverse=True)
        counts = torch.zeros(len(chunks), len(tokens), dtype=torch.float64, device=chunks.device)
        counts.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64))
        before = F.pad((counts > 0).double().cumsum(0), (0, 0, 1, 0))
        first, last = visible.long().unbind(1)
        holding = before[last.clamp_min(0)] - before[first]
        num_visible = (last - first).clamp_min(0)[:, None]
        idf = torch.log1p((num_visible - holding + 0.5).clamp_min(0) / (holding + 0.5))
        scores = (counts * idf) @ (counts * (self.k1 + 1) / (counts + self.k1)).T
        # Rounded, so that equal chunks tie whatever the order of summation was.
        return (scores * 2**20).round().masked_fill((counts @ counts.T) == 0, float("-inf"))


class RandomRetriever:
    """Uniform neighbours without replacement: a hash of seed, chunk text and candidate decides.

    Args:
        seed: Another seed, other neighbours.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, chunk_tokens: Tensor, top_k: int, visible: Tensor) -> Tensor:
        """Return the neighbours ``[B, N, K]``. See `Retriever`."""
        number = torch.arange(chunk_tokens.shape[1], device=chunk_tokens.device)
        state = _mixed(torch.full_like(chunk_tokens[..., 0], self.seed))
        for tokens in chunk_tokens.unbind(2):
            state = _mixed(state + tokens)
        return best_visible(_mixed(_mixed(state + number)[..., None] + number), top_k, visible)


class OracleRetriever:
    """Neighbours given beforehand.

    Args:
        indices: ``[B, N, K]`` int32, -1 = none; calls about the first few chunks get the first rows.
    """

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices

    def __call__(self, chunk_tokens: Tensor, top_k: int, visible: Tensor) -> Tensor:
        """Return ``[B, N, K]`` of what was given, nothing that is not visible. See `Retriever`."""
        given = self.indices[:, : chunk_tokens.shape[1], :top_k].to(chunk_tokens.device)
        seen = (given >= visible[..., :1]) & (given < visible[..., 1:])
        return torch.where(seen, given, -1).int()


def _mixed(x: Tensor) -> Tensor:
    """Scramble int64: the finaliser of SplitMix64, whose products wrap."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
