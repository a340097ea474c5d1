"""Case T5: DeepSpeed ZeRO-2 and ZeRO-3 on one GPU give the losses of plain training, to bf16 rounding."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.registry import Row, case
from benchmarks.training import BATCH, LENGTH, STEPS, TRAINING_ALONE, make_data, make_module, quiet, write_corpus

# Largest relative difference of two losses of a few bf16 steps.
ALLOWED = 1e-2
Options = Callable[[], dict[str, Any]]


class _Losses(pl.Callback):
    """Keep the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def _train(folder: str, options: dict[str, Any]) -> list[float]:
    losses = _Losses()
    alone = TRAINING_ALONE | {"devices": 1, "max_steps": STEPS, "gradient_clip_val": 1.0, "logger": False}
    trainer = pl.Trainer(**(alone | options), callbacks=[losses])
    trainer.fit(make_module(), datamodule=make_data(folder))
    return losses.values


def compare(plain: dict[str, Any], others: dict[str, Options]) -> Iterator[Row]:
    """Train a small DRT a few steps with the plain options of a Trainer, and with others by name."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_corpus(Path(folder))
        expected = _train(folder, plain)
        for name, options in others.items():
            found = _train(folder, options())
            pairs = zip(found, expected, strict=True)
            difference = max(abs(ours - other) / abs(other) for ours, other in pairs)
            shape = f"{name}, {STEPS} steps of {BATCH} x {LENGTH} tokens"
            measure = "largest relative difference of a loss"
            yield Row(shape, measure, difference, "bf16 rounding", ALLOWED, 1, "lower", floor=1)


def _deepspeed(stage: int) -> dict[str, Any]:
    """Return what `trainer=deepspeed_2` and `trainer=deepspeed_3` choose."""
    from callbacks.sharded_strategies import ShardedDeepSpeed
    from lightning_modules.deepspeed_precision import GradientsScaledOnce

    plugin = GradientsScaledOnce(precision="bf16-mixed")
    return {"accelerator": "gpu", "strategy": ShardedDeepSpeed(stage=stage), "plugins": [plugin]}


@case("T5", group="deepspeed_gpu", device="cuda", needs="deepspeed")
def deepspeed_smoke() -> Iterator[Row]:
    stages: dict[str, Options] = {f"ZeRO-{stage}": partial(_deepspeed, stage) for stage in (2, 3)}
    yield from compare({"accelerator": "gpu", "precision": "bf16-mixed"}, stages)
