"""What a training step needs of the memory of one process, before anything is started.

Notable: weights, gradients and moments follow from the strategy; activations are counted by running the recipe's own
forward and backward pass on tensors without data (`memory_step`, `memory_trace`). Not in it: the allocator's losses,
buffers of communication beyond those named here, work space inside kernels and libraries.

Letters: B sequences of a micro-batch, T tokens, W processes, N chunks, S tokens of a chunk, G kv heads, D head size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from configuration.memory_step import is_deepspeed, on_gpu, trace_module
from configuration.precision import precision_of

FLOAT = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process.

    Attributes:
        weights: as they are kept.
        gradients: of trained weights, as they are kept.
        moments: AdamW's two, and float32 copies of weights where an engine keeps them.
        activations: everything else of forward and backward at their fullest moment; None where it is not known.
        copies: whole weights and gradients of the layers in use, where they are kept in shards; DDP's buckets.
        together: gradients and activations at their fullest moment; in the backward pass the ones come as the others
            go.
        update: what the optimiser computes with.
        host: of the above, in host memory.
    """

    weights: int
    gradients: int
    moments: int
    activations: int | None = None
    copies: int = 0
    together: int = 0
    update: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device at the fullest moment of a step, without activations where they are not known."""
        passing = max(self.together, self.gradients + self.update)
        return self.weights + self.moments + self.copies + passing - self.host


def step_memory(module: Any, config: dict[str, Any], *, processes: int, context_parallel_size: int = 1) -> StepMemory:
    """Memory of a step of a composed recipe.

    Args:
        module: of the run, what `memory_step.blank_module` returned.
        config: the recipe.
        processes: W, those with batches of their own.
        context_parallel_size: processes that share a sequence, each with its part of the tokens.

    Raises:
        ValueError: the model's sequences cannot be shared.
    """
    accumulates = config["trainer"].get("accumulate_grad_batches", 1) > 1
    states = _states(module.model, config["trainer"], processes=processes)
    try:
        trace = trace_module(module, config, context_parallel_size=context_parallel_size)
    except RuntimeError as error:  # an operator whose result depends on numbers
        logger.warning("activations are not counted: %s", str(error).splitlines()[0])
        return replace(states, together=states.gradients)
    if _is_fsdp(config["trainer"]) or is_deepspeed(config["trainer"]) or accumulates:
        # Shards are in their places all the time, and so are gradients of earlier micro-batches.
        together = states.gradients + trace.most
    else:
        # Those of the step before are dropped between forward and backward pass.
        together = max(states.gradients + trace.forward, trace.most_together)
    return replace(states, activations=trace.most, together=together)


def _states(model: nn.Module, trainer: dict[str, Any], *, processes: int) -> StepMemory:
    """Everything that does not depend on the data."""
    weights, trained = _nbytes(model), _nbytes(model, trained=True)
    if is_deepspeed(trainer):
        return _deepspeed(model, trainer, processes=processes)
    if _is_fsdp(trainer):
        return _fsdp(model, processes=processes)
    strategy = trainer.get("strategy")
    options = strategy if isinstance(strategy, dict) else {}
    # One process that is told to is wrapped, too.
    wrapped = bool(options) or processes > 1
    buckets = trained if wrapped and not options.get("gradient_as_bucket_view") else 0
    # AdamW of a GPU takes the roots of all moments at once, unless it is fused, which gradient clipping under autocast
    # rules out.
    roots = trained if on_gpu(trainer) and precision_of(trainer).endswith("mixed") else 0
    return StepMemory(weights, trained, 2 * trained, copies=buckets, update=roots)


def _is_fsdp(trainer: dict[str, Any]) -> bool:
    strategy = trainer.get("strategy")
    return isinstance(strategy, dict) and str(strategy.get("_target_", "")).endswith("FullyShardedData")


def _fsdp(model: nn.Module, *, processes: int) -> StepMemory:
    """All in shards; whole at a time is what lies outside the layers, a layer, and the next one on its way."""
    copies = 0
    for trained in (False, True):  # weights, gradients
        layers = [_nbytes(layer, trained=trained) for layer in _layers(model)]
        copies += _nbytes(model, trained=trained) - sum(layers) + 2 * max(layers, default=0)
    weights, gradients = _nbytes(model) // processes, _nbytes(model, trained=True) // processes
    return StepMemory(weights, gradients, 2 * gradients, copies=copies)


def _deepspeed(model: nn.Module, trainer: dict[str, Any], *, processes: int) -> StepMemory:
    """ZeRO: float32 master weights and moments in shards; from stage 2 on gradients too, in stage 3 weights too."""
    options = trainer["strategy"]
    stage = int(options.get("stage", 2))
    weights, gradients = _nbytes(model), _nbytes(model, trained=True)
    masters = sum(p.numel() for p in model.parameters() if p.requires_grad) * FLOAT * 3 // processes
    return StepMemory(
        weights // (processes if stage == 3 else 1),
        gradients // (processes if stage >= 2 else 1),
        masters,
        copies=max(map(_nbytes, _layers(model)), default=0) if stage == 3 else 0,
        host=masters if options.get("offload_optimizer") else 0,
    )


def _nbytes(part: nn.Module, *, trained: bool = False) -> int:
    return sum(p.nbytes for p in part.parameters() if p.requires_grad or not trained)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The units that a strategy gathers one by one."""
    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
