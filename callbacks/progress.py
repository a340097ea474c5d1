"""A progress bar in optimiser steps, with loss, tokens per second and validation perplexity.

Notable: Lightning's bar reads every metric after every batch, which makes the host wait for the device each time, and
counts batches of an "epoch" that means nothing here. This one reads metrics only where they are logged, and fits a
terminal of 80 columns.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

NAMES = {
    "train/loss": ("loss", "{:.3f}"),
    "perf/tokens_per_second": ("tok/s", "{:,.0f}"),
    "val/perplexity": ("ppl", "{:.2f}"),
}


class StepProgressBar(RichProgressBar):
    """Show ``step / max_steps`` and the metrics of `NAMES`, in their order, as far as they exist."""

    @property
    def validation_description(self) -> str:
        """A short name, since the columns are as wide as the longest."""
        return "val  "

    @property
    def total_train_batches(self) -> int | float:
        """Optimiser steps of the run (micro-batches when the trainer has no ``max_steps``)."""
        steps = self.trainer.max_steps
        return steps if steps > 0 else super().total_train_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance to the optimiser step reached."""
        if self.is_disabled:
            return
        if self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
        reached = trainer.global_step if trainer.max_steps > 0 else batch_idx + 1
        self._update(self.train_progress_bar_id, reached)
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            self._update_metrics(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the named metrics as short texts."""
        metrics = trainer.progress_bar_metrics | {
            name: value for name, value in trainer.callback_metrics.items() if name in NAMES
        }
        return {short: form.format(float(metrics[name])) for name, (short, form) in NAMES.items() if name in metrics}

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Return name, bar, count, time passed and time left; the metrics follow."""
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        ]

    def _get_train_description(self, current_epoch: int) -> str:
        return "train"
