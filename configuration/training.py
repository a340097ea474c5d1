"""Assemble a training run from its recipe and drive it from the first step to the exported model."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from callbacks.checkpoint import checkpoint_step, newest_checkpoint
from callbacks.loss_log import read_rows
from callbacks.sharded_strategies import SealedCheckpoints
from configuration.errors import Stopped
from configuration.export import restored_module, save_model_folder
from configuration.precision import precision_of
from configuration.quiet import quiet
from configuration.run_folder import open_run, versions, write_start
from configuration.run_lock import naming_lost_processes, only_run_in
from configuration.sizes import describe
from configuration.step_size import settle_step_size
from configuration.targets import build
from evaluation.results import write_json
from lightning_modules.lora import has_adapters
from preprocess.disk import full_disk_named


def run(config: dict[str, Any], say: Callable[[str], None] = lambda _: None) -> None:
    """Train, validate at the end, write ``metrics.json`` and the model folder.

    Args:
        config: the composed and checked recipe.
        say: receives the lines for the user.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: with one sentence for the user.
        Stopped: Ctrl-C or SIGTERM ended the training.
    """
    import models  # noqa: F401 - registers the suite's models with transformers' Auto classes

    quiet()
    settle_step_size(config)
    folder, checkpoint = open_run(config)
    trainer = build_trainer(config)
    module = build(config["module"], "module")
    data = build_data(config)
    check_vocabulary(config, data)
    with full_disk_named(folder), only_run_in(folder, first=trainer.is_global_zero):
        if trainer.is_global_zero:
            write_start(folder, config)
            copy_tokenizer(data.tokenizer_path, folder / "tokenizer")
            say(f"{'resuming ' + str(checkpoint) if checkpoint else 'starting'} -> {folder}")
        with stopping_in_order(trainer, config), naming_lost_processes(trainer.world_size > 1):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint and str(checkpoint), weights_only=True)
            finish(trainer, module, data, config=config)
    if trainer.is_global_zero:
        say(f"metrics: {folder / 'metrics.json'}")
        if config["export_model"]:
            say(f"model:   {folder / 'model'}")


@contextmanager
def stopping_in_order(trainer: pl.Trainer, config: dict[str, Any]) -> Iterator[None]:
    """Say where a run that a signal stopped stands; Lightning turns both signals into a ``SystemExit``.

    Options that Lightning finds out to be wrong as late as in a loop are a user's error too.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(f"the trainer refuses these options: {error}") from error
    except (SystemExit, KeyboardInterrupt) as stop:
        if isinstance(stop, SIGTERMException):
            number, verb = signal.SIGTERM, "terminated"
        elif isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            number, verb = signal.SIGINT, "interrupted"
        else:
            raise
        if not trainer.is_global_zero:
            raise SystemExit(128 + number) from None
        newest = newest_checkpoint(Path(config["output"]) / "checkpoints")
        command = "the same command" if config["resume"] == "auto" else "the same command with resume=auto"
        goes_on = "starts again" if newest is None else f"resumes from checkpoint step {checkpoint_step(newest)}"
        raise Stopped(f"{verb} at step {trainer.global_step}; {command} {goes_on}", number) from None


def build_data(config: dict[str, Any]) -> pl.LightningDataModule:
    """Make sure that what the datamodule reads exists, then build it.

    ``prepare`` returns the corpus folder, or the datamodule's options for stores of another kind.
    """
    options = dict(config["data"])
    if config["prepare"] is not None:
        prepared = build(config["prepare"], "prepare")
        options |= prepared if isinstance(prepared, dict) else {"path": prepared}
    return build(options, "data")


def build_trainer(config: dict[str, Any]) -> pl.Trainer:
    """Build the trainer with its named callbacks and loggers.

    ``eval_every_n_steps`` counts optimiser steps; Lightning counts micro-batches.
    """
    options = dict(config["trainer"])
    micro_batches = options["accumulate_grad_batches"]
    steps = min(config["eval_every_n_steps"] or options["max_steps"], options["max_steps"])
    callbacks = [callback for callback in build(config["callbacks"], "callbacks").values() if callback is not None]
    if options.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    # Without one, Lightning would add its own, whose files nothing here resumes from.
    options.setdefault("enable_checkpointing", any(isinstance(callback, Checkpoint) for callback in callbacks))
    options |= {
        "default_root_dir": config["output"],
        "callbacks": callbacks,
        "logger": list(build(config["logger"], "logger").values()) or False,
        "val_check_interval": steps * micro_batches,
        "check_val_every_n_epoch": None,
    }
    return build(options, "trainer")


def check_vocabulary(config: dict[str, Any], data: Any) -> None:
    """Refuse a corpus whose token ids the model cannot read or would take for something else."""
    model = model_settings(config["model"])
    eos, landmark = model.get("eos_token_id"), model.get("landmark_token_id")
    for corpus in (data.train_corpus, data.validation_corpus):
        if corpus is None:
            continue
        ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
        problem = corpus.misfit(vocab_size=model.get("vocab_size"), eos_token_ids=ends)
        if problem:
            raise ValueError(
                f"{problem}: pass vocabulary=NAME for the tokenizer of the corpus, or "
                f"vocabulary.size={corpus.vocab_size} vocabulary.eos={corpus.eos_token_id}"
            )
        if landmark is not None and corpus.contains(landmark):
            raise ValueError(
                f"{corpus.path} holds token {landmark}, which the model takes for its landmark: pass "
                "vocabulary.landmark=N with an id that no text has"
            )


def model_settings(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the model to be built: in the recipe, or in the folder it is loaded from."""
    if "config" in model or "path" not in model:
        return model.get("config") or {}
    from models.pretrained import load_config

    settings: dict[str, Any] = load_config(model["path"]).get_text_config().to_dict()
    return settings


def copy_tokenizer(source: Path | str | None, target: Path) -> None:
    """Keep the tokenizer beside the run, so that its model folder is complete."""
    if source is not None and Path(source).is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def finish(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, *, config: dict) -> None:
    """Validate the final weights unless that was just done; write the metrics and the model."""
    folder = Path(config["output"])
    watchers = [callback for callback in trainer.callbacks if hasattr(callback, "last_result")]
    validated = all((watcher.last_result or {}).get("step") == trainer.global_step for watcher in watchers)
    if watchers and not validated and not trainer.fast_dev_run:
        trainer.validate(module, datamodule=data, verbose=False)
    if not trainer.is_global_zero:
        return
    metrics = {"recipe": config["recipe"], "step": trainer.global_step, "protocol": protocol(config, data)}
    if (folder / "train.jsonl").exists():
        metrics["train"] = read_rows(folder / "train.jsonl")[-1]
    if watchers:
        metrics["validation"] = {name: value for w in watchers for name, value in (w.last_result or {}).items()}
    write_json(folder / "metrics.json", metrics)
    if config["export_model"]:
        write_model(whole_module(trainer, module, config), folder)


def whole_module(trainer: pl.Trainer, module: pl.LightningModule, config: dict[str, Any]) -> Any:
    """The trained module with all its weights in this process: of a sharded one, from the last checkpoint.

    Raises:
        ValueError: a sharded run kept no checkpoint of its last step.
    """
    if not isinstance(trainer.strategy, SealedCheckpoints):
        return module
    newest = newest_checkpoint(Path(config["output"]) / "checkpoints")
    if newest is None or checkpoint_step(newest) != trainer.global_step:
        raise ValueError(
            "sharded weights are exported from a checkpoint: keep callbacks.checkpoint or export_model=false"
        )
    return restored_module(config, newest)


def write_model(module: Any, folder: Path) -> None:
    """Write the Hugging Face folder of a run, and that of its adapters."""
    tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else None
    save_model_folder(module.model_to_export(), folder / "model", tokenizer=tokenizer)
    if has_adapters(module.model):
        module.save_adapter(folder / "adapter")


def protocol(config: dict[str, Any], data: Any) -> dict[str, Any]:
    """What the validation numbers depend on besides the weights."""
    return data.validation_protocol() | {"precision": precision_of(config["trainer"]), "versions": versions()}


def dry_run(config: dict[str, Any], missing: Sequence[str]) -> str:
    """Build what a run builds, without weights; return the sizes and what this machine lacks for the run.

    Raises:
        ValueError: the trainer refuses its options (not asked where something is missing).
    """
    quiet()
    if not missing:
        build_trainer(config)
    return describe(config, missing)
