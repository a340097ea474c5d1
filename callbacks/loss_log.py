"""One JSON line for each optimiser step: the loss curve as exact numbers, continued exactly after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.ranks import num_data_ranks
from evaluation.results import write_text


class LossLog(pl.Callback):
    """Write ``{"step", "loss", "lr", "grad_norm", "tokens"}`` lines and log the same to the loggers.

    The loss is the mean over all targets of the step, of all micro-batches and ranks; ``grad_norm`` is measured
    before clipping; ``tokens`` counts the input tokens of all ranks since the start of the run. Training steps return
    ``{"nll_sum", "num_targets"}``. Values stay on their device until a logging step, when the ranks meet and the host
    waits once.

    Args:
        path: the file (rank 0 writes). On resume, lines after the resumed step are dropped, since those steps are
            taken again.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self.sums: list[torch.Tensor] = []
        self.tokens, self.lr = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut the file back to the step that training starts from."""
        self.rows, self.sums = [], []
        if trainer.is_global_zero:
            truncate(self.path, trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the learning rate in force."""
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the micro-batch; close the row when the optimiser has stepped."""
        # Lightning divides "loss" by the accumulation before callbacks see it.
        self.sums.append(torch.stack([outputs["nll_sum"].double(), outputs["num_targets"].double()]))
        self.tokens += batch["input_ids"].numel() * num_data_ranks(trainer)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        sums, self.sums = torch.stack(self.sums).sum(0), []
        grad_norm = getattr(pl_module, "grad_norm", None)
        row = {"step": trainer.global_step, "loss": sums, "lr": self.lr, "grad_norm": grad_norm, "tokens": self.tokens}
        self.rows.append(row)
        # What loggers number the values with; left to itself, Lightning takes the step before.
        pl_module.log("step", torch.tensor(float(trainer.global_step)))  # on the host: nothing waits for it
        if trainer.global_step % trainer.log_every_n_steps == 0:
            last = self.flush(trainer)[-1]
            pl_module.log("train/loss", last["loss"], prog_bar=True)
            pl_module.log("train/lr", self.lr)
            if grad_norm is not None:
                pl_module.log("train/grad_norm", grad_norm)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is left."""
        self.flush(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what is left, so that the curve up to the failure can be read.

        The other ranks may not come here: the losses are those of rank 0, until a resumed run takes these steps again.
        """
        self.flush(trainer, all_ranks=False)

    def state_dict(self) -> dict[str, Any]:
        """Called when a checkpoint is saved: the token count."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the token count."""
        self.tokens = state_dict["tokens"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Write the lines up to this checkpoint before it exists: a resumed curve has no gap."""
        self.flush(trainer)

    def flush(self, trainer: pl.Trainer, *, all_ranks: bool = True) -> list[dict[str, Any]]:
        """Append the collected rows to the file (rank 0); return them as plain numbers.

        Args:
            trainer: of the run.
            all_ranks: average over the ranks, all of which must call.
        """
        rows, self.rows = self.rows, []
        if not rows:
            return []
        sums = torch.stack([row["loss"] for row in rows])
        if all_ranks:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        losses = [nll_sum / count if count else math.nan for nll_sum, count in sums.tolist()]
        plain = [
            row | {"loss": loss, "grad_norm": _item(row["grad_norm"])} for row, loss in zip(rows, losses, strict=True)
        ]
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in plain)
        return plain


def _item(value: torch.Tensor | None) -> float | None:
    return None if value is None else float(value)


def _finite(value: Any) -> Any:
    """What is not finite becomes null, since JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
