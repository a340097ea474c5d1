"""The progress bar counts optimiser steps and shows the metrics by short names."""

import io
import re

import pytest

from callbacks.progress import StepProgressBar
from callbacks.validation_perplexity import ValidationPerplexity


class Watched(StepProgressBar):
    """Remember the train task and the metrics at each refresh; write to memory."""

    def __init__(self):
        self.screen = io.StringIO()
        super().__init__(console_kwargs={"file": self.screen, "width": 80, "force_terminal": True})
        self.seen, self.metric_updates = [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seen.append((self.train_progress_bar.completed, self.train_progress_bar.total))
        self.description = self.train_progress_bar.description

    def _update_metrics(self, trainer, pl_module):
        super()._update_metrics(trainer, pl_module)
        self.metric_updates += 1
        self.shown = self.get_metrics(trainer, pl_module)


def logging_module(lab):
    class Logging(lab["Module"]):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            self.log("train/loss", out["loss"], prog_bar=True)
            return out

    return Logging(lab["tiny_llama"]())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_counts_steps_and_shows_metrics(fit, lab, accumulate):
    bar = Watched()
    fit(
        bar,
        ValidationPerplexity(),
        module=logging_module(lab),
        accumulate_grad_batches=accumulate,
        enable_progress_bar=True,
    )
    assert bar.seen == [((i + 1) // accumulate, 10) for i in range(10 * accumulate)]
    assert bar.description.strip() == "train"
    assert list(bar.shown) == ["loss", "ppl"]
    assert float(bar.shown["loss"]) > 1
    assert bar.metric_updates < 10 * accumulate
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", bar.screen.getvalue()).splitlines()[-1].rstrip()
    assert last.startswith("train")
    assert last.endswith(f"ppl: {bar.shown['ppl']}")


def test_training_is_unchanged(fit, lab):
    import torch

    _, plain = fit(enable_progress_bar=False)
    _, watched = fit(Watched(), enable_progress_bar=True)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
