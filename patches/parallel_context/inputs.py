"""Token ids as users pass them: lists, lists of lists or tensors, one example or a batch."""

from typing import Any

import torch
from torch import Tensor

from patches.parallel_context.splitting import token_list

IGNORE_INDEX = -100


def _depth(value: Any) -> int:
    """Return how deep lists and tensors are nested: 0 for a token, 1 for tokens; an empty list counts as 1."""
    if isinstance(value, Tensor):
        return value.dim()
    if isinstance(value, list | tuple):
        return 1 + max((_depth(item) for item in value), default=0)
    return 0


def as_context(pieces: Any) -> list[list[list[int]]]:
    """Return pieces as rows of pieces of token ids; one example becomes one row.

    Raises:
        ValueError: On an empty piece, or ids that are not integers.
    """
    if len(pieces) and _depth(pieces) < 2:
        raise ValueError(
            "pieces is a list of pieces, each a list of token ids; split one text with split_context first"
        )
    # Pieces without a token make no example: nothing but empty lists is a batch of contexts without pieces.
    batch = _depth(pieces) > 2 or (len(pieces) > 0 and not any(len(item) for item in pieces))
    rows = pieces if batch else [pieces]
    result = [[token_list(piece) for piece in row] for row in rows]
    for number, row in enumerate(result):
        if any(not piece for piece in row):
            raise ValueError(f"row {number} has an empty piece; every piece needs at least one token")
    return result


def as_queries(query_ids: Any, batch: int) -> tuple[Tensor, list[int]]:
    """Return queries padded at the right ``[B, T]`` with their lengths.

    Raises:
        ValueError: If there is not one query per row, or one is empty.
    """
    rows = [token_list(row) for row in query_ids] if _depth(query_ids) > 1 else [token_list(query_ids)]
    if len(rows) != batch:
        raise ValueError(f"the state holds {batch} contexts, so there must be as many queries, got {len(rows)}")
    lengths = [len(row) for row in rows]
    if not all(lengths):
        raise ValueError("every query needs at least one token")
    width = max(lengths)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), lengths


def as_targets(targets: Any, tokens: Tensor, lengths: list[int]) -> Tensor:
    """Return the ids predicted at each query position ``[B, T]``, -100 where nothing is scored.

    Without targets it is the next token of the query.
    """
    batch, width = tokens.shape
    result = torch.full((batch, width), IGNORE_INDEX)
    if targets is None:
        for row, length in enumerate(lengths):
            result[row, : length - 1] = tokens[row, 1:length]
        return result
    rows = [token_list(row) for row in targets] if _depth(targets) > 1 else [token_list(targets)]
    if len(rows) != batch:
        raise ValueError(f"there must be one list of targets per query, {batch}, got {len(rows)}")
    for row, (given, length) in enumerate(zip(rows, lengths, strict=True)):
        beyond = given[length:]
        if len(given) < length or any(value != IGNORE_INDEX for value in beyond):
            raise ValueError(
                f"targets are ids predicted at each query token: row {row} needs {length}, got {len(given)}"
            )
        result[row, :length] = torch.tensor(given[:length])
    return result
