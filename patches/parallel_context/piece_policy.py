"""Judge pieces one by one, right after their micro-batch: how well they predict the query, which slots stay.

Notable: a judged piece stands behind nothing but the prefix, and its query is read plainly, without the policies of
the query.

Legend: B batch, b pieces of a micro-batch, S their padded length, T query tokens, G kv heads, R query heads of a kv
head, D head size, n kept slots, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patches.parallel_context.dispatch import last_valid
from patches.parallel_context.encode import Piece, PieceAttention, padded
from patches.parallel_context.eviction import TokenEviction, pool_scores
from patches.parallel_context.hook import ModelHook
from patches.parallel_context.inputs import IGNORE_INDEX
from patches.parallel_context.key_groups import KeyPart
from patches.parallel_context.meters import Recorder
from patches.parallel_context.options import KeepPieces
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.piece_share import PieceShare, both
from patches.parallel_context.problem import Problem
from patches.parallel_context.query_pass import Context, QueryPass
from patches.parallel_context.scoring import score_hidden
from patches.parallel_context.slots import last_rows, observe


@dataclass(frozen=True)
class KeptPiece:
    """One piece after its policies."""

    piece: Piece
    score: float | None
    """Mean NLL of the query behind prefix and piece, or its mean attention on the piece."""
    layers: list[tuple[Tensor, Tensor, Tensor]]
    """Keys and values ``[G, n, D]`` and positions ``[G or 1, n]`` of each layer."""


@dataclass(frozen=True)
class Queries:
    """The queries of a batch, padded at the right."""

    tokens: Tensor
    """``[B, T]``."""
    lengths: list[int]


class PieceJudge:
    """Runs micro-batches of pieces, scores them by the query and evicts their slots."""

    def __init__(
        self, hook: ModelHook, options: ParallelContext, *, prefix: Sequence[KeyPart], queries: Queries | None
    ) -> None:
        """Prepare; ``queries`` may be missing where no policy looks at them."""
        self._hook, self._options, self._prefix, self._queries = hook, options, prefix, queries
        eviction = options.eviction
        self._eviction = eviction if eviction is not None and eviction.stage == "piece" else None
        policy = options.piece_policy
        self._policy = policy if policy is not None and policy.needs_query else None
        self._offset = prefix[0].keys.shape[2] if prefix else 0
        # Piece scores and observations are plain, whatever policies the query has.
        self._plain = ParallelContext(
            prefix=None, implementation=options.implementation, workspace_mb=options.workspace_mb
        )

    def judge(self, pieces: list[Piece], starts: Tensor) -> list[KeptPiece]:
        """Encode a micro-batch; ``starts`` ``[b]`` is where the query of each piece begins."""
        batch = _MicroBatch(pieces, self._hook.num_layers)
        tokens, places = padded(pieces)
        attention = PieceAttention(
            places,
            self._prefix,
            batch.write,
            implementation=self._plain.implementation,
            workspace=self._plain.workspace,
            watch=self._watch(batch, "piece"),
        )
        device = self._hook.device
        hidden = self._hook.forward(tokens.to(device), places.to(device), attention)
        scores: list[float | None] = [None] * len(pieces)
        if self._policy is not None or self._watch(batch, "query") is not None:
            found = self._read_queries(batch, places, starts, last_valid(hidden, batch.lengths))
            scores = list(found) or scores
        return [batch.take(index, places, score) for index, score in enumerate(scores)]

    def _read_queries(self, batch: "_MicroBatch", places: Tensor, starts: Tensor, last: Tensor) -> list[float]:
        """Read each piece's query behind prefix and piece alone; returns the scores, none without a policy."""
        assert self._queries is not None
        counts = tuple(((0, length),) for length in batch.lengths)
        layers = [
            (*self._prefix[layer : layer + 1], KeyPart(keys, values, counts, places.to(keys.device)[:, None]))
            for layer, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True))
        ]
        rows = [piece.row for piece in batch.pieces]
        tokens, lengths = self._queries.tokens[rows], [self._queries.lengths[row] for row in rows]
        query = QueryPass(
            self._hook,
            Context(layers, (1,) * len(rows), starts, least=min(0.0, float(places.min()))),
            options=self._plain,
            capacity=tokens.shape[1],
            recorder=Recorder((), self._hook.num_layers),
        )
        policy, evicted = self._policy, self._watch(batch, "query")
        share = PieceShare(batch.lengths, self._offset, 0 if policy is None else policy.query_tokens or 0)
        by_attention = policy is not None and policy.score == "attention"
        query.watch = both(share if by_attention else None, evicted)
        hidden = query.forward(tokens, lengths)
        if policy is None:
            return []
        if by_attention:
            return share.means()
        return self._mean_nll(policy, torch.cat([last[:, None], hidden[:, :-1]], 1), tokens, lengths)

    def _mean_nll(self, policy: KeepPieces, hidden: Tensor, tokens: Tensor, lengths: list[int]) -> list[float]:
        """Return the mean NLL of the last query tokens under the hidden states before them."""
        wanted = last_rows(lengths, tokens.shape[1], policy.query_tokens or 0)
        targets = tokens.masked_fill(~wanted, IGNORE_INDEX)
        nll, _ = score_hidden(self._hook, hidden, targets, return_logits=False, workspace=self._plain.workspace)
        return (nll.double().sum(1).cpu() / wanted.sum(1)).tolist()

    def _watch(self, batch: "_MicroBatch", rows: str) -> "_Watch | None":
        """Return what observes the attention of a layer, where the eviction wants these rows."""
        eviction = self._eviction
        if eviction is None or eviction.observe != rows or eviction.method == "streaming":
            return None
        if all(eviction.capacity >= length for length in batch.lengths) and eviction.method != "pyramidkv":
            return None
        return _Watch(batch, eviction, offset=self._offset)


@dataclass
class _MicroBatch:
    """Keys and values of some pieces ``[b, G, S, D]`` per layer, and the slots of each to keep."""

    pieces: list[Piece]
    num_layers: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    slots: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By layer and piece: ``[G, n]``, missing where all stay."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each piece."""
        return [len(piece.tokens) for piece in self.pieces]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take the next layer."""
        assert layer == len(self.keys)
        self.keys.append(keys)
        self.values.append(values)

    def take(self, index: int, places: Tensor, score: float | None) -> KeptPiece:
        """Copy what stays of a piece."""
        length, layers = self.lengths[index], []
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            slots = self.slots.get((layer, index))
            where = places[index, :length].to(keys.device)[None]
            if slots is None:
                layers.append((keys[index, :, :length].clone(), values[index, :, :length].clone(), where))
                continue
            full = slots[..., None].expand(-1, -1, keys.shape[3])
            layers.append((keys[index].gather(1, full), values[index].gather(1, full), where[0][slots]))
        return KeptPiece(self.pieces[index], score, layers)


@dataclass(frozen=True)
class _Watch:
    """Chooses the slots of every piece of a micro-batch from the attention of a layer."""

    batch: _MicroBatch
    eviction: TokenEviction
    offset: int
    """Slots in front of the pieces."""

    def __call__(self, layer: int, problem: Problem, lengths: list[int] | None = None) -> None:
        """Observe the last valid rows (h2o: all); ``lengths`` counts them, None: the tokens of the pieces."""
        eviction = self.eviction
        lengths = self.batch.lengths if lengths is None else lengths
        count = 0 if eviction.method == "h2o" else eviction.observation
        weights = observe(problem, last_rows(lengths, problem.query.shape[2], count))
        kernel = 1 if eviction.method == "h2o" else eviction.kernel
        for index, length in enumerate(self.batch.lengths):
            inside = weights[index, :, :, self.offset : self.offset + length]
            scores = pool_scores(inside, kernel, eviction.pool).mean(1)
            budget = eviction.budget(layer, self.batch.num_layers, length)
            if budget < length:
                self.batch.slots[layer, index] = eviction.choose(scores[None], budget, layer)[0]
