"""Everything that can be known to be wrong before anything heavy happens, in one list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from callbacks.checkpoint import named_checkpoint
from configuration.binding import bind, bind_all
from configuration.compose import at_source
from configuration.errors import ConfigError
from configuration.options import TaskOptions, TrainOptions
from configuration.precision import precision_of
from configuration.run_folder import other_owner
from configuration.step_size import settle_step_size, sharing_processes
from configuration.targets import build, import_target, is_target

# Trainer options that the suite sets itself, and what to use for them.
_OURS = {
    "callbacks": "the section callbacks",
    "check_val_every_n_epoch": "eval_every_n_steps=N",
    "default_root_dir": "output=FOLDER",
    "logger": "the section logger",
    "val_check_interval": "eval_every_n_steps=N",
}


def check(config: dict[str, Any]) -> list[str]:
    """Check a composed recipe.

    Returns:
        With ``dry_run=true``: what this machine lacks for the run, devices and paths; else an empty list.

    Raises:
        ConfigError: with all problems: unknown or missing options, wrong types, sizes the model refuses,
            options that constructors refuse, devices that are not there, paths that do not exist.
    """
    train = config.get("command", "train") == "train"
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    problems = at_source(bind(TrainOptions if train else TaskOptions, config) + bind_all(sections), config)
    missing: list[str] = []
    if train and not problems:
        try:
            settle_step_size(config)
        except ConfigError as error:
            problems += error.problems
    if not problems:
        problems += _model_problems(config.get("model", {})) + _output_problems(config)
        problems += _train_problems(config) if train else _prompt_problems(config)
        missing = _device_problems(config["trainer"]) + _path_problems(config) if train else []
    if problems or (missing and not config.get("dry_run")):
        raise ConfigError(problems + missing)
    return missing


def _build_problems(node: Any, path: str) -> list[str]:
    """Build small objects that refuse impossible options in their constructors."""
    try:
        build(node, path)
    except ValueError as error:
        return [str(error)]
    return []


def _model_problems(model: dict[str, Any]) -> list[str]:
    """Build the model's configuration, which refuses impossible sizes; look for a folder it is loaded from."""
    config = model.get("config")
    problems = _build_problems(config, "model.config") if is_target(config) else []
    for name in ("path", "pretrained_model_name_or_path"):
        path = model.get(name)
        if isinstance(path, str) and path.startswith((".", "/", "runs/")) and not Path(path).exists():
            problems.append(f"model.{name}={path} does not exist: pass a folder or a hub name")
    return problems


def _output_problems(config: dict[str, Any]) -> list[str]:
    """One folder holds the results of one command."""
    output, command = config.get("output"), config.get("command", "train")
    if output is None or command == "export":  # which looks at its folder itself
        return []
    if not output:
        return ["output is empty: pass output=FOLDER"]
    if Path(output).exists() and not Path(output).is_dir():
        return [f"output={output} is a file: pass a folder"]
    owner = other_owner(Path(output), command)
    return [f"output={output} holds {owner}: pass another output="] if owner else []


def _prompt_problems(config: dict[str, Any]) -> list[str]:
    path = config.get("prompt_file")
    if path is None or not Path(path).exists():
        return []
    if Path(path).is_dir():
        return [f"prompt_file={path} is a folder: pass one text file"]
    try:
        Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return [f"prompt_file={path} is no UTF-8 text (byte {error.start}): convert it, with iconv for example"]
    return []


def _train_problems(config: dict[str, Any]) -> list[str]:
    trainer = config["trainer"]
    problems = _build_problems(config["module"].get("optimization"), "module.optimization")
    for name, callback in config["callbacks"].items():
        problems += _build_problems(callback, f"callbacks.{name}")
    problems += [f"trainer.{key} is not used: set {_OURS[key]}" for key in trainer if key in _OURS]
    if (trainer.get("gradient_clip_val") or 0) < 0:
        problems.append(
            f"trainer.gradient_clip_val must be above 0, or null not to clip, got {trainer['gradient_clip_val']}"
        )
    if (trainer.get("log_every_n_steps") or 0) < 1:
        problems.append(f"trainer.log_every_n_steps must be at least 1, got {trainer.get('log_every_n_steps')}")
    if (trainer.get("max_steps") or 0) < 1:
        problems.append(f"trainer.max_steps must be at least 1, got {trainer.get('max_steps')}")
    every = config.get("eval_every_n_steps")
    if every is not None and every < 1:
        problems.append(f"eval_every_n_steps must be at least 1 or null, got {every}")
    return problems + _sharing_problems(trainer, config["data"])


def _sharing_problems(trainer: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Processes share rows that one text fills."""
    if sharing_processes(trainer) == 1:
        return []
    if data.get("documents") == "packed":
        return ["trainer=context_parallel splits rows of one text: pass data.documents=stream, or trainer=ddp"]
    if not getattr(import_target(data["_target_"]), "whole_rows", False):
        return [f"trainer=context_parallel splits rows of one text, not those of {data['_target_']}: pass trainer=ddp"]
    return []


def _path_problems(config: dict[str, Any]) -> list[str]:
    resume = config.get("resume", "auto")
    if isinstance(resume, str) and resume != "auto":
        try:
            named_checkpoint(resume)
        except FileNotFoundError as error:
            return [f"resume={resume}: {error}"]
    path: str | None = config["data"].get("path")
    if path is None:  # stores of another kind, which are looked for when they are prepared
        return []
    prepare = config.get("prepare") or {}
    # A recipe's own text is for the recipe's own path: a mistyped data.path is not filled with it.
    source: str | None = prepare.get("source") if prepare.get("source_path") in (None, path) else None
    text = None if source in (None, "python_stdlib") or str(source).startswith("hub:") else source
    if text is not None and not Path(path).exists() and not Path(text).exists():
        return [f"prepare.source={source} does not exist: pass text, hub:NAME or python_stdlib"]
    if source is None and not Path(path).exists():
        return [
            f"data.path={path} does not exist: make it with python -m preprocess.tokenize SOURCE --output {path}, "
            "or name another folder"
        ]
    return []


def _device_problems(trainer: dict[str, Any]) -> list[str]:
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    precision = precision_of(trainer)
    found = torch.cuda.device_count()
    problems = []
    if accelerator in ("gpu", "cuda") and found == 0:
        problems.append(
            f"trainer.accelerator={accelerator} but this machine has no CUDA device: "
            "pass scale=laptop or scale=tiny, which run on a CPU, or trainer=cpu"
        )
    elif accelerator in ("gpu", "cuda") and isinstance(devices, int) and devices > found:
        problems.append(f"trainer.devices={devices} but this machine has {found} CUDA device(s)")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and found == 0)
    if on_cpu and precision.startswith("16"):
        problems.append(f"trainer.precision={precision} does not train on a CPU: pass 32-true or bf16-mixed")
    return problems
