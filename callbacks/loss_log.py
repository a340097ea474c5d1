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
    before clipping; ``tokens`` counts the input tokens of all ranks since the start of the run, without padding where
    the batch has an ``attention_mask`` or the training step returns ``num_tokens``: how wide the rows of a micro-batch
    are depends on which of them it holds. Training steps return ``{"nll_sum", "num_targets"}``. Values stay on their
    device until a logging step, when the ranks meet and the host waits once.

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
        sums = (outputs["nll_sum"], outputs["num_targets"], input_tokens(outputs, batch))
        self.sums.append(torch.stack([value.double() for value in sums]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step_sums, self.sums = torch.stack(self.sums).sum(0), []
        grad_norm = getattr(pl_module, "grad_norm", None)
        self.rows.append({"step": trainer.global_step, "sums": step_sums, "lr": self.lr, "grad_norm": grad_norm})
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
        checkpoint["callbacks"][self.state_key] = self.state_dict()  # which was asked for before

    def flush(self, trainer: pl.Trainer, *, all_ranks: bool = True) -> list[dict[str, Any]]:
        """Append the collected rows to the file (rank 0); return them as plain numbers.

        Args:
            trainer: of the run.
            all_ranks: add the ranks up, all of which must call; else the others are taken to have read as many tokens.
        """
        rows, self.rows = self.rows, []
        if not rows:
            return []
        sums = torch.stack([row["sums"] for row in rows])
        num_readers = num_data_ranks(trainer)
        if all_ranks:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
            num_readers = 1 / max(1, trainer.world_size // num_readers)  # ranks with the same batch have read it once
        plain = []
        for row, (nll_sum, count, tokens) in zip(rows, sums.tolist(), strict=True):
            self.tokens += round(tokens * num_readers)
            loss, grad_norm = nll_sum / count if count else math.nan, _item(row["grad_norm"])
            numbers = {"loss": loss, "lr": row["lr"], "grad_norm": grad_norm, "tokens": self.tokens}
            plain.append({"step": row["step"]} | numbers)
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in plain)
        return plain


def input_tokens(outputs: Any, batch: Any) -> torch.Tensor:
    """Number of input tokens of a micro-batch without padding, a scalar on the device of the sums."""
    if "num_tokens" in outputs:
        return outputs["num_tokens"]
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    return torch.full((), batch["input_ids"].numel(), device=outputs["nll_sum"].device)


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
