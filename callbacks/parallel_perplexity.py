"""Perplexity and attention entropy by degree, inside validation: contexts cut into pieces, the same rows for every one.

B rows, N tokens of a row.

Notable: the patch that is scored here is the one that evaluation and generation use. Nothing but sums leaves a batch;
they are added over the ranks as sums.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.ranks import SAME_ON_ALL_RANKS
from evaluation.equal_calls import EqualCalls
from evaluation.loading import load_tokenizer
from evaluation.parallel_context.tails import TailCut, score_tails
from evaluation.scoring import perplexity_of
from patches.parallel_context import ParallelContext, SelectiveAttention


class ParallelPerplexity(pl.Callback):
    """Log ``parallel_perplexity/degree_{d}`` and ``parallel_entropy/degree_{d}``.

    Of each row of the first validation loader all but the last ``keep_tail + unsplit`` tokens are context, cut into d
    pieces; the rest is the query, of which the last ``keep_tail`` tokens are scored. Degree 1 is ordinary perplexity.
    Shorter rows are left out, and so are padding and rows that a rank repeats without a target to score. Reads
    ``{"counted": [B, T]}`` of validation steps.

    Args:
        degrees: numbers of pieces.
        keep_tail: scored tokens of a row.
        unsplit: tokens before them that belong to the query.
        prefix: what all pieces share, see `patches.parallel_context.ParallelContext`. A row that begins with the BOS of
            ``prefix="bos"`` is not given a second one.
        selection: selective attention of the query.
        position_mode: where pieces stand.
        patch: a patch whose options hold instead of the three above; only its degree is replaced.
        max_batches: batches of each validation and rank to score; None: all.
        tokenizer: tokenizer or its folder, for prefixes that are texts.

    Attributes:
        patches: the patch of each degree.
        results: by degree ``nll_sum``, ``num_targets``, ``perplexity`` and ``entropy`` (nats; mean over layers, heads
            and the rows of attention that predict scored tokens) of the last validation.
        last_result: the same with ``step``, as plain numbers. None before the first validation. It is kept in
            checkpoints.

    Raises:
        ValueError: degrees that are none, a number below 1, or options that contradict each other.
    """

    def __init__(
        self,
        degrees: Sequence[int] = (1, 2, 4, 8),
        *,
        keep_tail: int = 1024,
        unsplit: int = 1,
        prefix: str | None = "bos",
        selection: SelectiveAttention | None = None,
        position_mode: str = "ME",
        patch: ParallelContext | None = None,
        max_batches: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        if not degrees or len(set(degrees)) < len(degrees):
            raise ValueError(f"degrees must be different numbers of pieces, got {list(degrees)}")
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches must be at least 1 or None, got {max_batches}")
        self.cut, self.max_batches = TailCut(keep_tail, unsplit), max_batches
        base = patch or ParallelContext(prefix=prefix, selection=selection, position_mode=position_mode)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no effect.*")  # at some of the degrees, by intent
            self.patches = {degree: replace(base, degree=degree) for degree in degrees}
        self.tokenizer = tokenizer
        self.results: dict[int, dict[str, Any]] = {}
        self.last_result: dict[str, Any] | None = None
        self._sums: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the tokenizer where its folder is named."""
        if isinstance(self.tokenizer, str):
            folder, self.tokenizer = self.tokenizer, load_tokenizer(self.tokenizer)
            if self.tokenizer is None:
                raise ValueError(f"ParallelPerplexity finds no tokenizer in {folder}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a model without parallel context before it is trained, not at the first validation."""
        try:
            with next(iter(self.patches.values())).bind(pl_module.model, self.tokenizer) as bound:
                bound.prefix_ids()
        except ValueError as error:
            raise ValueError(f"{error}; ~callbacks.parallel_perplexity leaves this callback out") from error

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start at zero."""
        self._sums = torch.zeros(len(self.patches), 3, dtype=torch.float64)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the rows of a batch at every degree."""
        beyond = self.max_batches is not None and batch_idx >= self.max_batches
        if trainer.sanity_checking or dataloader_idx or beyond:
            return
        assert self._sums is not None
        rows = text_rows(batch, outputs["counted"])
        # A compiled model would be compiled anew for every shape.
        eager = torch.compiler.set_stance("force_eager")
        with trainer.precision_plugin.forward_context(), eager:
            for index, patch in enumerate(self.patches.values()):
                calls = EqualCalls(trainer.strategy, pl_module.model)
                with patch.bind(pl_module.model, self.tokenizer) as bound, calls:
                    self._sums[index] += self._score(bound, rows, calls)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reduce over the ranks and log."""
        if trainer.sanity_checking or self._sums is None:
            return
        sums = trainer.strategy.reduce(self._sums.to(pl_module.device), reduce_op="sum").tolist()
        if not sums[0][1]:
            self._sums = None
            rank_zero_warn(
                f"ParallelPerplexity scored nothing: no validation row is longer than {self.cut.num_query_tokens} "
                "tokens; lower callbacks.parallel_perplexity.keep_tail, or pass ~callbacks.parallel_perplexity"
            )
            return
        self.results = {degree: _report(*row) for degree, row in zip(self.patches, sums, strict=True)}
        for degree, report in self.results.items():
            pl_module.log(f"parallel_perplexity/degree_{degree}", report["perplexity"], **SAME_ON_ALL_RANKS)
            pl_module.log(f"parallel_entropy/degree_{degree}", report["entropy"], **SAME_ON_ALL_RANKS)
        found = {str(degree): report for degree, report in self.results.items()}
        self.last_result, self._sums = {"step": trainer.global_step, "parallel_perplexity": found}, None

    def state_dict(self) -> dict[str, Any]:
        """Keep the last result, so that a run resumed after its last validation still reports it."""
        return {"last_result": self.last_result}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last result over."""
        self.last_result = state_dict["last_result"]

    def _score(self, bound: Any, rows: list[list[int]], calls: EqualCalls) -> Tensor:
        """Sums of a batch ``[3]``, see `evaluation.parallel_context.tails`; rows without a context are left out."""
        rows = [row for row in rows if len(row) > self.cut.num_query_tokens]
        if not rows:
            calls.meet()
            calls.meet()
            return torch.zeros(3, dtype=torch.float64)
        contexts, queries = map(list, zip(*map(self.cut.cut, rows), strict=True))
        if bound.options.prefix == "bos":
            contexts = [_without(bound.prefix_ids(), context) for context in contexts]
        pieces = [bound.options.split(context) for context in contexts]
        return score_tails(bound, pieces, queries, cut=self.cut, meet=calls.meet).sum(0)


def text_rows(batch: Mapping[str, Tensor], counted: Tensor) -> list[list[int]]:
    """Return the token ids of every row that is scored, without its padding.

    Args:
        batch: ``input_ids`` ``[B, N]``; where rows are padded ``attention_mask`` ``[B, N]``, or ``valid``
            ``[B, N - 1]``, whether the token behind a position counts.
        counted: ``[B, ...]``; a row without a target is another rank's, repeated here because rows ran out.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if mask is None and "valid" in batch:
        kept[:, 1:] = batch["valid"].flip(1).cummax(1).values.flip(1)  # up to the last target
    scored = counted.flatten(1).any(1).tolist()
    return [row[own].tolist() for row, own, mine in zip(ids, kept, scored, strict=True) if mine]


def _without(prefix: list[int], tokens: list[int]) -> list[int]:
    return tokens[len(prefix) :] if len(tokens) > len(prefix) and tokens[: len(prefix)] == prefix else tokens


def _report(nll_sum: float, num_targets: float, entropy_sum: float) -> dict[str, Any]:
    loss = nll_sum / num_targets if num_targets else math.nan
    return {
        "nll_sum": nll_sum,
        "num_targets": int(num_targets),
        "perplexity": perplexity_of(loss),
        "entropy": entropy_sum / num_targets if num_targets else math.nan,
    }
