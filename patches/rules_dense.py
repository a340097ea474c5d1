"""What a rule is, and its evaluation on index tensors.

Legend: B batch, T queries, S keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``rule(batch, head, query, key) -> bool``: index tensors that broadcast, or scalars under vmap."""


def evaluate(rule: Rule, batch_size: int, num_queries: int, num_keys: int, device: torch.device | str | None) -> Tensor:
    """Call a rule on all pairs of indices; returns bool ``[B, 1, T, S]``."""
    batch, query, key = (torch.arange(size, device=device) for size in (batch_size, num_queries, num_keys))
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    visible = rule(batch[:, None, None, None], head, query[:, None], key)
    return visible.expand(batch_size, 1, num_queries, num_keys)


def dense_mask(rule: Rule, batch_size: int, num_tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Evaluate a rule on rows of tokens; returns bool ``[B, 1, S, S]``, True = visible.

    Args:
        rule: Rule of the rows.
        batch_size: Number of rows.
        num_tokens: Columns of a row.
        device: Where the tensors that the rule reads lie.
    """
    return evaluate(rule, batch_size, num_tokens, num_tokens, device)


def at_indices(rule: Rule, query_index: Tensor, key_index: Tensor) -> Rule:
    """Return the rule whose queries and keys are the places of two lists of indices ``[B, T]`` and ``[B, S]``.

    An index of -1 is a hole: never visible, and it sees nothing.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = query_index[batch, query], key_index[batch, key]
        return rule(batch, head, row.clamp(min=0), column.clamp(min=0)) & (row >= 0) & (column >= 0)

    return visible


def index_mask(rule: Rule, query_index: Tensor, key_index: Tensor) -> Tensor:
    """Evaluate a rule between chosen columns, such as a chunk and the live entries of a cache.

    Args:
        rule: Rule of the rows.
        query_index: ``[B, T]`` int64, logical index of each query; -1 = hole, sees nothing.
        key_index: ``[B, S]`` int64, logical index of each key; -1 = hole, never visible.

    Returns:
        bool ``[B, 1, T, S]``, True = visible.
    """
    local = at_indices(rule, query_index, key_index)
    return evaluate(local, query_index.shape[0], query_index.shape[1], key_index.shape[1], query_index.device)
