"""Validation perplexity at several context lengths: every target once, exponential at the very end.

B batch, T tokens.

Notable: sums and counts stay in float64 on the device until the validation ends, are then added over the ranks in one
reduction per length, and only the final means are looked at. The names logged are what checkpoints may monitor.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from callbacks.ranks import SAME_ON_ALL_RANKS
from evaluation.positions import position_report
from evaluation.scoring import mean_report

METRICS = ("loss", "perplexity", "bits_per_byte")


class ValidationPerplexity(pl.Callback):
    """Collect ``{"nll": [B, T], "counted": [B, T]}`` of validation steps and log the means.

    For the first length of ``trainer.datamodule.eval_lengths``: ``val/loss`` (nats per target), ``val/perplexity``
    and, where the corpus knows its bytes, ``val/bits_per_byte``; for each further one the same with ``_at_<length>``.

    ``bits_per_byte = nll_sum / ln 2 / (num_targets * bytes per token)``, the bytes per token being those of the whole
    split (``validation_corpus.num_bytes / num_tokens``), so lengths and tokenizers stay comparable.

    Attributes:
        last_result: the last validation as plain numbers, by length: ``step`` and ``lengths[length]`` with
            ``nll_sum``, ``num_targets``, ``loss``, ``perplexity``, ``bits_per_byte`` and the loss by position
            (see `evaluation.positions`). None before the first one. It is kept in checkpoints.
    """

    def __init__(self) -> None:
        self.last_result: dict[str, Any] | None = None
        self._sums: dict[int, torch.Tensor] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier validation that did not end."""
        self._sums = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the scores of a batch to the sums of its length."""
        self._add(outputs, self._length(trainer, dataloader_idx, outputs), dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reduce over the ranks and log."""
        if trainer.sanity_checking:
            return
        bytes_per_token = _bytes_per_token(trainer)
        lengths: dict[str, dict[str, Any]] = {}
        for index, length in enumerate(self._lengths(trainer)):
            # A rank without a window of this length still takes part in the reduction.
            sums = self._sums.get(index, torch.zeros(2, length, dtype=torch.float64, device=pl_module.device))
            sums = trainer.strategy.reduce(sums, reduce_op="sum").cpu().numpy()
            report = _report(sums, bytes_per_token)
            suffix = "" if index == 0 else f"_at_{length}"
            for name in METRICS:
                if report[name] is not None:
                    shown = name == "perplexity" and index == 0
                    pl_module.log(f"val/{name}{suffix}", report[name], prog_bar=shown, **SAME_ON_ALL_RANKS)
            lengths[str(length)] = report
        # What loggers number the values with; left to itself, Lightning takes the step before.
        pl_module.log("step", float(trainer.global_step), **SAME_ON_ALL_RANKS)
        self.last_result = {"step": trainer.global_step, "lengths": lengths}
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        """Keep the last result, so that a run resumed after its last validation still reports it."""
        return {"last_result": self.last_result}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last result over."""
        self.last_result = state_dict["last_result"]

    def _add(self, outputs: Any, length: int, index: int) -> None:
        if not isinstance(outputs, dict) or not {"nll", "counted"} <= outputs.keys():
            raise ValueError('validation_step must return {"nll": [B, T], "counted": [B, T]} for ValidationPerplexity')
        nll, counted = outputs["nll"].double(), outputs["counted"]
        if index not in self._sums:
            self._sums[index] = torch.zeros(2, length, dtype=torch.float64, device=nll.device)
        self._sums[index][0, : nll.shape[1]] += nll.sum(0)
        self._sums[index][1, : nll.shape[1]] += counted.sum(0)

    def _lengths(self, trainer: pl.Trainer) -> list[int]:
        datamodule = getattr(trainer, "datamodule", None)
        lengths = getattr(datamodule, "eval_lengths", None)
        return list(lengths) if lengths is not None else [sums.shape[1] for _, sums in sorted(self._sums.items())]

    def _length(self, trainer: pl.Trainer, index: int, outputs: Any) -> int:
        lengths = getattr(getattr(trainer, "datamodule", None), "eval_lengths", None)
        return lengths[index] if lengths is not None else outputs["nll"].shape[1]


def _report(sums: np.ndarray, bytes_per_token: float | None) -> dict[str, Any]:
    nll_sum, num_targets = float(sums[0].sum()), int(sums[1].sum())
    return {
        "nll_sum": nll_sum,
        "num_targets": num_targets,
        **mean_report(nll_sum, num_targets, bytes_per_token),
        **position_report(sums[0], sums[1]),
    }


def _bytes_per_token(trainer: pl.Trainer) -> float | None:
    corpus = getattr(getattr(trainer, "datamodule", None), "validation_corpus", None)
    num_bytes, num_tokens = getattr(corpus, "num_bytes", None), getattr(corpus, "num_tokens", None)
    return num_bytes / num_tokens if num_bytes and num_tokens else None
