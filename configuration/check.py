"""Everything that can be known to be wrong before anything heavy happens, in one list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configuration.binding import bind, bind_all
from configuration.errors import ConfigError
from configuration.options import TaskOptions, TrainOptions
from configuration.targets import build, is_target


def check(config: dict[str, Any]) -> list[str]:
    """Check a composed recipe.

    Returns:
        With ``dry_run=true``: what this machine lacks for the run, devices and paths; else an empty list.

    Raises:
        ConfigError: with all problems: unknown or missing options, wrong types, sizes the model refuses,
            devices that are not there, paths that do not exist.
    """
    train = config.get("command", "train") == "train"
    problems = bind(TrainOptions if train else TaskOptions, config)
    # A training recipe hands its model to the module: checked there, named by its own section.
    skipped = ("model",) if train else ()
    sections = {key: value for key, value in config.items() if isinstance(value, dict) and key not in skipped}
    problems += [problem.replace("module.model.", "model.") for problem in bind_all(sections)]
    missing: list[str] = []
    if not problems:
        problems += _model_problems(config.get("model", {}))
        problems += _train_problems(config) if train else []
        missing = _device_problems(config["trainer"]) + _path_problems(config) if train else []
    if problems or (missing and not config.get("dry_run")):
        raise ConfigError(problems + missing)
    return missing


def _build_problems(node: Any, path: str) -> list[str]:
    """Build a small object that refuses impossible options in its constructor."""
    if not is_target(node):
        return []
    try:
        build(node)
    except ValueError as error:
        return [f"{path}: {error}"]
    return []


def _model_problems(model: dict[str, Any]) -> list[str]:
    """Build the model's configuration, which refuses impossible sizes; look for a folder it is loaded from."""
    problems = _build_problems(model.get("config"), "model.config")
    path = model.get("pretrained_model_name_or_path")
    if isinstance(path, str) and path.startswith((".", "/", "runs/")) and not Path(path).exists():
        problems.append(f"model.pretrained_model_name_or_path={path} does not exist: pass a folder or a hub name")
    return problems


def _train_problems(config: dict[str, Any]) -> list[str]:
    trainer = config["trainer"]
    problems = _build_problems(config["module"].get("optimization"), "module.optimization")
    if (trainer.get("log_every_n_steps") or 0) < 1:
        problems.append(f"trainer.log_every_n_steps must be at least 1, got {trainer.get('log_every_n_steps')}")
    if (trainer.get("max_steps") or 0) < 1:
        problems.append(f"trainer.max_steps must be at least 1, got {trainer.get('max_steps')}")
    every = config.get("eval_every_n_steps")
    if every is not None and every < 1:
        problems.append(f"eval_every_n_steps must be at least 1 or null, got {every}")
    return problems


def _path_problems(config: dict[str, Any]) -> list[str]:
    resume = config.get("resume", "auto")
    if isinstance(resume, str) and resume != "auto" and not Path(resume).is_file():
        return [f"resume={resume} is no checkpoint file: pass auto, false or the path of a .ckpt file"]
    path: str = config["data"]["path"]
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
    precision = str(trainer.get("precision") or "32-true")
    found = torch.cuda.device_count()
    problems = []
    if accelerator in ("gpu", "cuda") and found == 0:
        problems.append(
            f"trainer.accelerator={accelerator} but this machine has no CUDA device: "
            "pass trainer=cpu, or scale=tiny to try the recipe here"
        )
    elif accelerator in ("gpu", "cuda") and isinstance(devices, int) and devices > found:
        problems.append(f"trainer.devices={devices} but this machine has {found} CUDA device(s)")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and found == 0)
    if on_cpu and precision.startswith("16"):
        problems.append(f"trainer.precision={precision} does not train on a CPU: pass 32-true or bf16-mixed")
    return problems
