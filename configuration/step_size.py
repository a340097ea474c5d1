"""How many sequences an optimiser step has: one number, however many processes and micro-batches share them."""

from __future__ import annotations

from typing import Any

import torch

from configuration.errors import ConfigError

_COPIES = ("data", "module")


def num_data_processes(trainer: dict[str, Any]) -> int:
    """Processes with batches of their own, as the options of a trainer say; ``auto`` is what this machine has.

    Raises:
        ConfigError: processes that share their sequences do not come out even.
    """
    nodes, strategy = int(trainer.get("num_nodes") or 1), trainer.get("strategy")
    options = strategy if isinstance(strategy, dict) else {}
    target = str(options.get("_target_", ""))
    if target.endswith(".ModelParallelStrategy"):
        # The other dimension of its mesh splits layers.
        size = options.get("data_parallel_size", "auto")
        return nodes if size == "auto" else int(size)
    processes = nodes * _devices(trainer.get("devices", "auto"), str(trainer.get("accelerator", "auto")))
    if target.endswith(".ContextParallel"):
        size = options.get("context_parallel_size", "auto")
        group = processes if size == "auto" else int(size)
        if group < 1 or processes % group:
            raise ConfigError(
                [
                    f"trainer.strategy.context_parallel_size={size} does not divide {processes} process(es): "
                    "change it, or trainer.devices"
                ]
            )
        return processes // group
    return processes


def sharing_processes(trainer: dict[str, Any]) -> int:
    """Processes that share a sequence, as the options of a trainer say."""
    strategy = trainer.get("strategy")
    if not isinstance(strategy, dict) or not str(strategy.get("_target_", "")).endswith(".ContextParallel"):
        return 1
    return num_data_processes(trainer | {"strategy": "auto"}) // num_data_processes(trainer)


def _devices(devices: Any, accelerator: str) -> int:
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and devices[:1].isdigit():  # a number, or numbers of devices
        return len([number for number in devices.split(",") if number.strip()]) if "," in devices else int(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return 1 if accelerator == "cpu" else max(1, torch.cuda.device_count())


def settle_step_size(config: dict[str, Any]) -> None:
    """Make ``sequences_per_step`` and the accumulation agree: the given number decides, else the product does.

    ``sequences_per_step = data.batch_size x trainer.accumulate_grad_batches x processes``

    Args:
        config: a composed recipe, changed in place; settling it again changes nothing.

    Raises:
        ConfigError: no whole number of micro-batches makes up the number.
    """
    data, trainer = config.get("data", {}), config["trainer"]
    batch_size, accumulate = data.get("batch_size"), trainer.get("accumulate_grad_batches", 1)
    if not isinstance(batch_size, int) or not isinstance(accumulate, int) or batch_size < 1:
        return  # reported where options are checked
    at_once, wanted = batch_size * num_data_processes(trainer), config.get("sequences_per_step")
    if wanted is None:
        config["sequences_per_step"] = at_once * accumulate
        return
    if not isinstance(wanted, int) or wanted < at_once or wanted % at_once:
        raise ConfigError(
            [
                f"sequences_per_step={wanted} is no multiple of {at_once}, data.batch_size={batch_size} on "
                f"{at_once // batch_size} process(es): change one of the three"
            ]
        )
    trainer["accumulate_grad_batches"] = wanted // at_once
    for section in _COPIES:
        if "accumulate_grad_batches" in config.get(section, {}):
            config[section]["accumulate_grad_batches"] = wanted // at_once
