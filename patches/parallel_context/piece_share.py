"""The attention that queries pay to one piece each, summed while they are read.

Legend: b pieces of a micro-batch, T query tokens, G kv heads, R query heads of a kv head, N context slots, P prefix
length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from patches.parallel_context.problem import Problem
from patches.parallel_context.query_pass import Watch
from patches.parallel_context.slots import last_rows, observe


@dataclass
class PieceShare:
    """Collects ``mean over layers, heads and rows of sum_j a[j]``, j the slots of the piece.

    The weights a are those over all that the row sees: prefix, its piece, the query before it.
    """

    lengths: Sequence[int]
    """Tokens of each piece."""
    offset: int
    """P."""
    query_tokens: int = 0
    """Last rows of the query that count; 0: all."""
    _layers: list[list[float]] = field(default_factory=list)

    def __call__(self, layer: int, problem: Problem, lengths: list[int]) -> None:
        """Take the attention call of a layer; ``lengths`` counts the valid query tokens of every row."""
        rows = last_rows(lengths, problem.query.shape[2], self.query_tokens)
        weights = observe(problem, rows).double().mean((1, 2)).cpu() / rows.sum(1)[:, None]  # [b, N + T]
        stops = [self.offset + length for length in self.lengths]
        self._layers.append([float(row[self.offset : stop].sum()) for row, stop in zip(weights, stops, strict=True)])

    def means(self) -> list[float]:
        """Return the share of every piece, the mean over the layers."""
        return [sum(found) / len(found) for found in zip(*self._layers, strict=True)]


def both(*watches: Watch | None) -> Watch | None:
    """Return what hands every call to all that are there; None if none is."""
    present = [watch for watch in watches if watch is not None]

    def watch(layer: int, problem: Problem, lengths: list[int]) -> None:
        for one in present:
            one(layer, problem, lengths)

    return watch if present else None
