"""What ``dry_run=true`` prints: sizes of a run, the memory of a process, the work of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from callbacks.throughput import flops_per_token, peak_tflops
from configuration.memory import StepMemory, step_memory
from configuration.memory_step import blank_module
from configuration.step_size import num_data_processes, settle_step_size, sharing_processes


def describe(config: dict[str, Any], missing: Sequence[str] = ()) -> str:
    """Sizes of a run, from its own module without weights or data.

    Args:
        config: the composed recipe.
        missing: what this machine lacks for the run, printed after the sizes.
    """
    import models  # noqa: F401 - registers the suite's models with transformers' Auto classes

    settle_step_size(config)
    module = blank_module(config)
    trainer, sequences = config["trainer"], config["sequences_per_step"]
    length = config["data"].get("context_length") or config["module"]["context_length"]
    tokens = sequences * length
    weights = [(p.numel(), p.requires_grad) for p in module.model.parameters()]
    processes, sharing = num_data_processes(trainer), sharing_processes(trainer)
    lines = {
        "recipe": f"{config['recipe']} (scale {config['scale']})",
        "parameters": f"{sum(n for n, _ in weights):,}, trainable {sum(n for n, trained in weights if trained):,}",
        "tokens per step": f"{tokens:,} = {sequences} sequences of {length:,}",
        "steps": f"{trainer['max_steps']:,}, {trainer['max_steps'] * tokens:,} tokens in all",
        **memory_lines(step_memory(module, config, processes=processes, context_parallel_size=sharing)),
        **work_lines(module.model, tokens, length=length, devices=processes * sharing),
        "output": config["output"],
    }
    width = max(map(len, lines))
    sizes = [f"{key:<{width}}  {value}" for key, value in lines.items()]
    return "\n".join([*sizes, *(f"not ready here:  {sentence}" for sentence in missing)])


def memory_lines(memory: StepMemory) -> dict[str, str]:
    """What a process needs, in words."""
    names = ("weights", "gradients", "moments", "copies", "activations")
    parts = {name: getattr(memory, name) for name in names}
    named = [f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size or (name != "copies" and size == 0)]
    if memory.activations is None:
        named.append("activations not known")
    lines = {"memory a device": f"{memory.device / 2**30:.2f} GiB ({', '.join(named)})"}
    return lines | ({"memory of the host": f"{memory.host / 2**30:.2f} GiB a process"} if memory.host else {})


def work_lines(model: Any, tokens: int, *, length: int, devices: int) -> dict[str, str]:
    """The work of a step, and the least time for it on GPUs like that of this machine.

    Args:
        model: with or without ``num_flops_per_token``.
        tokens: of a step.
        length: of a sequence.
        devices: that share the work.
    """
    work = flops_per_token(model, length) * tokens
    what = "forward and backward" if hasattr(model, "num_flops_per_token") else "6 a parameter and token, no attention"
    lines = {"work per step": f"{work / 1e12:.3g} TFLOP ({what})"}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_tflops(name)
    if peak is not None:
        seconds = work / 1e12 / (peak * devices)
        lines["time of a step"] = (
            f"at least {seconds:.3g} s, {tokens / seconds:,.0f} tokens/s: {devices} x {name} at {peak:g} TFLOP/s, "
            "the data sheet's peak, which no run reaches"
        )
    return lines
