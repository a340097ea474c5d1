"""Perplexity of the compressed model at several ratios, inside validation; the dense one beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from callbacks.ranks import SAME_ON_ALL_RANKS
from evaluation.kv_compression import perplexity


class CompressionPerplexity(pl.Callback):
    """Log ``val/perplexity_at_<ratio>`` and ``val/perplexity_dense``.

    Every process scores the same blocks, the first ones of ``trainer.datamodule.validation_blocks``, with the method of
    the module; spans are always the same. Ratio 0 of the method is the dense one and is not scored twice.

    Args:
        ratios: fractions removed, all above 0.
        num_blocks: blocks to score.
        batch_size: blocks of a forward.

    Attributes:
        last_result: the last validation as plain numbers: ``step`` and ``compression``, reports by ratio (see
            `evaluation.kv_compression.perplexity`). None before the first one. It is kept in checkpoints.

    Raises:
        ValueError: a ratio outside (0, 1), or a number below 1.
    """

    def __init__(self, ratios: Sequence[float] = (0.3, 0.5, 0.7), *, num_blocks: int = 64, batch_size: int = 8) -> None:
        if not all(0 < ratio < 1 for ratio in ratios):
            raise ValueError(f"ratios must lie between 0 and 1, got {list(ratios)}; dense is scored anyway")
        if num_blocks < 1 or batch_size < 1:
            raise ValueError(f"num_blocks and batch_size must be at least 1, got {num_blocks} and {batch_size}")
        self.ratios, self.num_blocks, self.batch_size = tuple(ratios), num_blocks, batch_size
        self.last_result: dict[str, Any] | None = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score and log."""
        if trainer.sanity_checking:
            return
        found = {"dense": self._score(trainer, pl_module, 0.0)}
        if pl_module.compression.method != "dense":
            found |= {f"at_{ratio}": self._score(trainer, pl_module, ratio) for ratio in self.ratios}
        for name, report in found.items():
            pl_module.log(f"val/perplexity_{name}", report["perplexity"], **SAME_ON_ALL_RANKS)
        self.last_result = {"step": trainer.global_step, "compression": found}

    def state_dict(self) -> dict[str, Any]:
        """Keep the last result, so that a run resumed after its last validation still reports it."""
        return {"last_result": self.last_result}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last result over."""
        self.last_result = state_dict["last_result"]

    def _score(self, trainer: pl.Trainer, module: Any, ratio: float) -> dict[str, Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = data.validation_blocks
        blocks = [found[index] for index in range(min(self.num_blocks, len(found)))]
        sampler = replace(data.sampler, compression_ratio=ratio)
        spans = None
        if ratio and module.compression.method == "sentinel":
            spans = data.spans_to_score(blocks, sampler, data.validation_split)
        return perplexity(
            module.model,
            blocks,
            method=module.compression.method if ratio else "dense",
            compression_ratio=ratio,
            sentinels=module.sentinels,
            sampler=sampler,
            spans=spans,
            batch_size=self.batch_size,
            num_sinks=module.compression.num_sinks,
            exclude_sentinel_logits=module.exclude is not None,
        )
