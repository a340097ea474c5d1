"""The bound engine: encode contexts, score queries behind them, generate.

Legend: B batch, T query tokens, V vocabulary, L layers, N key slots.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from patches.parallel_context.cache import PieceCache
from patches.parallel_context.checks import check_count
from patches.parallel_context.encoder import EncodeRequest, encode_context
from patches.parallel_context.generation import GenerateResult, Sampling, continue_query, end_tokens
from patches.parallel_context.hook import ModelHook
from patches.parallel_context.inputs import as_context, as_queries, as_targets
from patches.parallel_context.meters import Recorder, check_meters
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.piece_policy import Queries
from patches.parallel_context.query_pass import Context, QueryPass
from patches.parallel_context.scoring import ScoreResult, score_hidden
from patches.parallel_context.splitting import token_list


class BoundContext:
    """A `ParallelContext` bound to a model; usable inside its ``with`` block only."""

    def __init__(self, options: ParallelContext, model: Any, tokenizer: Any) -> None:
        self.options, self.tokenizer = options, tokenizer
        self._hook = ModelHook(model)
        calibration = options.calibration
        if calibration is not None and calibration.layers[0] >= self._hook.num_layers:
            warnings.warn(
                f"calibration has no effect: it begins at layer {calibration.layers[0]}, the model has "
                f"{self._hook.num_layers}",
                stacklevel=4,
            )
        self._prefix: list[int] | None = None
        self._open, self._warned = True, False

    def prefix_ids(self) -> list[int]:
        """Return the token ids of the `prefix` option."""
        self._check_open()
        if self._prefix is None:
            self._prefix = self.options.prefix_ids(self.tokenizer, self._hook.config)
        return list(self._prefix)

    def encode(self, pieces: Any, prefix: Any = None, *, query_ids: Any = None) -> PieceCache:
        """Encode pieces in parallel behind one shared prefix.

        Args:
            pieces: List of pieces of token ids (one example), or a list of such lists (a batch of any lengths).
            prefix: Token ids that replace the `prefix` option; [] for none.
            query_ids: The queries, for policies that look at them while encoding.

        Returns:
            The encoded contexts; one state serves many queries.

        Raises:
            ValueError: On an empty piece or context, or positions beyond what the model's rotary embedding bears.
        """
        self._check_open()
        rows = as_context(pieces)
        ids = self.prefix_ids() if prefix is None else token_list(prefix)
        if not ids and not all(rows):
            raise ValueError("a context without pieces needs a prefix")
        self._check_pieces(rows, query_ids)
        queries = None if query_ids is None else Queries(*as_queries(query_ids, len(rows)))
        with self._hook.scope():
            return encode_context(self._hook, self.options, EncodeRequest(rows, ids, queries))

    def score(
        self,
        state: PieceCache,
        query_ids: Any,
        targets: Any = None,
        *,
        meters: Iterable[str] = (),
        return_logits: bool = False,
    ) -> ScoreResult:
        """Score targets behind a context; the state is not changed.

        Args:
            state: Encoded contexts.
            query_ids: One query per row: list, list of lists or tensor ``[B, T]``.
            targets: Ids predicted at each query position ``[B, T]``, -100 ignored; None: the next query token.
            meters: Names of statistics to return.
            return_logits: Whether to return all logits.
        """
        self._check_open()
        tokens, lengths = as_queries(query_ids, state.batch_size)
        wanted = as_targets(targets, tokens, lengths)
        recorder = Recorder(check_meters(meters), self._hook.num_layers)
        with self._hook.scope():
            query = self._query(state, capacity=tokens.shape[1], recorder=recorder)
            hidden = query.forward(tokens, lengths)
            nll, logits = score_hidden(
                self._hook, hidden, wanted, return_logits=return_logits, workspace=self.options.workspace
            )
        mask = (wanted != -100).to(nll.device)
        return ScoreResult(nll, mask, nll.double().sum(1), mask.sum(1), logits, recorder.results())

    def generate(
        self,
        state: PieceCache,
        query_ids: Any,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        eos_token_id: int | list[int] | Literal["model"] | None = "model",
        meters: Iterable[str] = (),
        **sampling: Any,
    ) -> GenerateResult:
        """Continue queries behind a context; greedy unless sampling is asked for. The state is not changed.

        Args:
            state: Encoded contexts.
            query_ids: One query per row.
            max_new_tokens: Tokens to generate at most.
            min_new_tokens: Before this many tokens no end token is chosen.
            eos_token_id: What ends a row (included in it): "model" reads the generation config; None: nothing.
            meters: Names of statistics to return, over query and generated tokens.
            **sampling: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``seed``; torch's global generator stays.
        """
        self._check_open()
        check_count("max_new_tokens", max_new_tokens)
        check_count("min_new_tokens", min_new_tokens, 0)
        tokens, lengths = as_queries(query_ids, state.batch_size)
        ends, choice = end_tokens(eos_token_id, self._hook.model), Sampling(**sampling)
        recorder = Recorder(check_meters(meters), self._hook.num_layers)
        with self._hook.scope():
            query = self._query(state, capacity=tokens.shape[1] + max_new_tokens, recorder=recorder)
            rows = continue_query(
                query,
                tokens,
                lengths,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                ends=ends,
                sampling=choice,
            )
        text = None
        if self.tokenizer is not None:
            text = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return GenerateResult(rows, text, recorder.results(), query.live_slots())

    def close(self) -> None:
        """Refuse further calls."""
        self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("this context is no longer bound: its with block has ended")

    def _check_pieces(self, rows: list[list[list[int]]], query_ids: Any) -> None:
        """Raise a ValueError where a policy lacks the query, or cannot serve so many pieces."""
        policy, eviction = self.options.piece_policy, self.options.eviction
        if query_ids is None and policy is not None and policy.needs_query:
            raise ValueError("KeepPieces scores pieces by the query: encode(pieces, query_ids=...)")
        if query_ids is None and eviction is not None and eviction.needs_query:
            raise ValueError("TokenEviction observes the query: encode(pieces, query_ids=...), or observe='piece'")
        if eviction is not None and eviction.method == "streaming" and max(map(len, rows)) > 1:
            raise ValueError(f"streaming is a baseline for one piece, got {max(map(len, rows))} pieces")

    def _query(self, state: PieceCache, *, capacity: int, recorder: Recorder) -> QueryPass:
        if state.fingerprint and state.fingerprint != self._hook.fingerprint:
            raise ValueError("this state was encoded by another model; encode the context again")
        selection, most = self.options.selection, max(state.num_pieces)
        if selection is not None and self.options.degree is None and selection.keeps_all(most) and not self._warned:
            self._warned = True
            warnings.warn(f"selection has no effect on a context of {most} piece(s)", stacklevel=3)
        return QueryPass(self._hook, Context.of(state), options=self.options, capacity=capacity, recorder=recorder)


@contextmanager
def bind_context(options: ParallelContext, model: Any, tokenizer: Any) -> Iterator[BoundContext]:
    """Bind options to a model while inside."""
    bound = BoundContext(options, model, tokenizer)
    try:
        yield bound
    finally:
        bound.close()
