"""LongPPL and loss by position, inside validation.

B batch, T targets, K position buckets.

Notable: key tokens are chosen by a model that sees each target with a long and with a short context: the evaluated
model itself, or a fixed evaluator with the same tokenizer, under which runs compare. Sums stay on the device until the
validation ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.ranks import SAME_ON_ALL_RANKS
from evaluation.equal_calls import EqualCalls
from evaluation.loading import load_model
from evaluation.long_ppl import full_context_nll, key_tokens, long_ppl_sums, short_context_nll
from evaluation.position_loss import bucket_nll
from evaluation.scoring import perplexity_of


class LongPerplexity(pl.Callback):
    """Log ``val/long_ppl``, ``val/key_token_share`` and ``val/ce_{a}_{b}``.

    Reads ``{"nll": [B, T], "counted": [B, T]}`` of validation steps and the batch's ``input_ids`` [B, T + 1].
    LongPPL = exp of the mean loss over the key tokens of all validation sequences; without a key token there is none.

    Args:
        context_length: K, tokens of the short context at least.
        stride: targets of a window; its length is ``context_length + stride``.
        alpha: a key token gains more than this (nats) from the long context.
        beta: and its log probability with it is above this.
        position_edges: borders of the position buckets.
        evaluator: folder or hub name of the model that chooses key tokens; None: the model that is validated.

    Attributes:
        last_result: the last validation as plain numbers, with ``step`` and ``long_perplexity``. None before the first
            one. It is kept in checkpoints.
    """

    def __init__(
        self,
        *,
        context_length: int = 4096,
        stride: int = 1024,
        alpha: float = 2.0,
        beta: float = -2.0,
        position_edges: Sequence[int] = (0, 8192, 16384, 32768),
        evaluator: str | None = None,
    ) -> None:
        if context_length < 1 or stride < 1:
            raise ValueError(f"context_length and stride must be at least 1, got {context_length} and {stride}")
        self.context_length, self.stride, self.alpha, self.beta = context_length, stride, alpha, beta
        self.edges, self.evaluator = tuple(position_edges), evaluator
        self.last_result: dict[str, Any] | None = None
        self._sums: Tensor | None = None
        self._model: Any = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start at zero."""
        self._sums = torch.zeros(3 + 2 * (len(self.edges) - 1), dtype=torch.float64, device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Choose the key tokens of a batch and add up."""
        nll, valid = outputs["nll"], outputs["counted"]
        key = self.key_tokens(pl_module, batch["input_ids"], nll, valid) & valid
        key_sum, key_count = long_ppl_sums(nll, key)
        bucket_sums, bucket_counts = bucket_nll(nll.double(), valid, self.edges)
        parts = [key_sum, key_count, valid.sum(), *bucket_sums, *bucket_counts]
        assert self._sums is not None
        self._sums += torch.stack([part.double() for part in parts])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reduce over the ranks and log."""
        if trainer.sanity_checking or self._sums is None:
            return
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        key_sum, key_count, targets = sums[:3]
        buckets = len(self.edges) - 1
        found = {"key_token_share": key_count / targets} if targets else {}
        if key_count:
            found["long_ppl"] = perplexity_of(key_sum / key_count)
        for (a, b), nll, count in zip(pairwise(self.edges), sums[3 : 3 + buckets], sums[3 + buckets :], strict=True):
            if count:
                found[f"ce_{a}_{b}"] = nll / count
        for name, value in found.items():
            pl_module.log(f"val/{name}", value, **SAME_ON_ALL_RANKS)
        numbers = {"num_key_tokens": int(key_count), "evaluator": self.evaluator or "the model itself", **found}
        self.last_result = {"step": trainer.global_step, "long_perplexity": numbers}

    def state_dict(self) -> dict[str, Any]:
        """Keep the last result, so that a run resumed after its last validation still reports it."""
        return {"last_result": self.last_result}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last result over."""
        self.last_result = state_dict["last_result"]

    def key_tokens(self, pl_module: pl.LightningModule, input_ids: Tensor, nll: Tensor, valid: Tensor) -> Tensor:
        """Key tokens of a batch, bool [B, T]."""
        model: Any = pl_module.model
        if self.evaluator is not None:
            model = self._load(pl_module.device)
            nll = full_context_nll(model, input_ids)
        windows = {"context_length": self.context_length, "stride": self.stride}
        # Each process has all of an evaluator; which windows are scored depends on the rows of a rank.
        strategy = pl_module.trainer.strategy if self.evaluator is None else None
        with EqualCalls(strategy, model, head_is_read=True) as calls:
            short = short_context_nll(model, input_ids, **windows, valid=valid)
            calls.meet()
        return key_tokens(nll, short, alpha=self.alpha, beta=self.beta)

    def _load(self, device: torch.device) -> Any:
        if self._model is None:
            assert self.evaluator is not None
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            self._model = load_model(self.evaluator, dtype=dtype, device=device)
        return self._model
