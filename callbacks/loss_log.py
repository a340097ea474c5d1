"""One JSON line for each optimiser step: the loss curve as exact numbers, continued exactly after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from evaluation.results import write_text


class LossLog(pl.Callback):
    """Write ``{"step", "loss", "lr", "grad_norm", "tokens"}`` lines and log the same to the loggers.

    The loss is the mean over the micro-batches of the step on this rank (rank 0 writes); ``grad_norm`` is measured
    before clipping; ``tokens`` counts this rank's input tokens since the start of the run.
    Values stay on their device until a logging step, so that no step waits for them.

    Args:
        path: the file. On resume, lines after the resumed step are dropped, since those steps are taken again.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self.losses: list[torch.Tensor] = []
        self.tokens, self.lr = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut the file back to the step that training starts from."""
        self.rows, self.losses = [], []
        if trainer.is_global_zero:
            truncate(self.path, trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note the learning rate in force."""
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the micro-batch; close the row when the optimiser has stepped."""
        self.losses.append(outputs["mean_nll"])
        self.tokens += outputs["num_tokens"]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss = torch.stack(self.losses).float().mean()
        self.losses = []
        grad_norm = getattr(pl_module, "grad_norm", None)
        row = {"step": trainer.global_step, "loss": loss, "lr": self.lr, "grad_norm": grad_norm, "tokens": self.tokens}
        self.rows.append(row)
        if trainer.global_step % trainer.log_every_n_steps:
            return
        pl_module.log("train/loss", loss, prog_bar=True)
        pl_module.log("train/lr", self.lr)
        if grad_norm is not None:
            pl_module.log("train/grad_norm", grad_norm)
        self.flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is left."""
        self.flush(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what is left, so that the curve up to the failure can be read."""
        self.flush(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Called when a checkpoint is saved: the token count."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the token count."""
        self.tokens = state_dict["tokens"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Write the lines up to this checkpoint before it exists: a resumed curve has no gap."""
        self.flush(trainer)

    def flush(self, trainer: pl.Trainer) -> None:
        """Append the collected rows to the file (rank 0)."""
        rows, self.rows = self.rows, []
        if not rows or not trainer.is_global_zero:
            return
        plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in plain)


def _plain(value: Any) -> Any:
    """A JSON value; what is not finite becomes null, since JSON has no NaN."""
    number = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a loss log; a last line that a kill cut off is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def truncate(path: Path, last_step: int) -> None:
    """Drop the rows after ``last_step``, atomically."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
