"""What a training step needs of the memory of one process, computed from sizes alone.

Notable: weights, gradients and moments follow exactly from the strategy. Activations are counted for decoders whose
configuration says their shape (Llama and its like), as what autograd keeps for the backward pass.

Letters: M model width, F width of the MLP, A = heads x head size, K = kv heads x head size, L layers, V vocabulary,
W processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

FLOAT = 4
# Modules that never hold the logits of all tokens.
_CHUNKED_HEADS = (".TokenWeightedLM",)
_LLAMA_LIKE = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process.

    Attributes:
        weights: as the forward pass reads them, and a gathered layer where they are sharded.
        gradients: of trained weights.
        moments: AdamW's two, and float32 copies of weights where an engine keeps them.
        activations: kept for the backward pass; None where the shape of the model is not known.
        host: of the above, in host memory.
    """

    weights: int
    gradients: int
    moments: int
    activations: int | None
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device, without activations where they are not known."""
        return self.weights + self.gradients + self.moments + (self.activations or 0) - self.host


def step_memory(model: torch.nn.Module, config: dict[str, Any], *, processes: int) -> StepMemory:
    """Memory of a step of a composed recipe.

    Args:
        model: of the run, on the meta device.
        config: the recipe.
        processes: W.
    """
    trainer, module = config["trainer"], config["module"]
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    largest = max((_numel(layer) for layer in _layers(model)), default=0)
    strategy = trainer.get("strategy")
    options = strategy if isinstance(strategy, dict) else {}
    name = str(options.get("_target_", ""))
    plugins = [str(plugin.get("precision")) for plugin in trainer.get("plugins") or [] if isinstance(plugin, dict)]
    precision = str(trainer.get("precision") or next((p for p in plugins if p != "None"), "32-true"))
    activations = decoder_activations(
        getattr(model, "config", None),
        tokens=config["data"]["batch_size"] * (config["data"].get("context_length") or module["context_length"]),
        precision=precision,
        checkpointing=bool(module.get("gradient_checkpointing")),
        with_logits=not str(module.get("_target_", "")).endswith(_CHUNKED_HEADS),
    )
    if name.endswith("DeepSpeed"):
        size = FLOAT if precision == "32-true" else 2
        found = _deepspeed(every, trained, size, options, processes=processes)
        return replace(
            found, activations=activations, weights=found.weights + (largest * size if _stage(options) == 3 else 0)
        )
    size = 2 if precision.endswith("16-true") else FLOAT
    share = processes if name.endswith("FullyShardedData") else 1
    gathered = largest * size if share > 1 else 0
    return StepMemory(
        every * size // share + gathered, trained * size // share, 2 * trained * size // share, activations
    )


def _stage(options: dict[str, Any]) -> int:
    return int(options.get("stage", 2))


def _deepspeed(every: int, trained: int, size: int, options: dict[str, Any], *, processes: int) -> StepMemory:
    """ZeRO: weights of ``size`` bytes, float32 master weights and moments in shards; from stage 2 on gradients too."""
    stage = _stage(options)
    weights = every * size // (processes if stage == 3 else 1)
    gradients = trained * size // (processes if stage >= 2 else 1)
    masters = trained * FLOAT * 3 // processes
    return StepMemory(weights, gradients, masters, None, host=masters if options.get("offload_optimizer") else 0)


def decoder_activations(
    config: Any, *, tokens: int, precision: str, checkpointing: bool, with_logits: bool = True
) -> int | None:
    """Bytes that autograd keeps of a micro-batch, for decoders of Llama's shape with a fused attention; else None.

    For every token and layer, float32: ``6 M + 2 A + 2 K + 4 F`` numbers (norms, projections, attention, MLP). Under
    bf16 autocast the norms keep ``4 M`` float32 numbers, the products the rest in two bytes. The head keeps ``3 M``,
    beside the logits, their log-probabilities and their gradient where a loss makes them. Checkpointing keeps ``M`` of
    every layer, and all of one.

    Args:
        config: of the model.
        tokens: of a micro-batch.
        precision: of the trainer.
        checkpointing: whether activations are recomputed.
        with_logits: whether the logits of all tokens exist at once.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if getattr(config, "model_type", None) not in _LLAMA_LIKE or not all(hasattr(config, name) for name in names):
        return None
    m, f, heads, layers, v = (int(getattr(config, name)) for name in names)
    head_dim = getattr(config, "head_dim", None) or m // heads
    a, k = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    low = precision != "32-true"
    if low:
        layer = 4 * m * FLOAT + 2 * (5 * m + 2 * a + 2 * k + 4 * f) + (heads + 2) * FLOAT
        head = 2 * m * FLOAT + 2 * m
    else:
        layer = FLOAT * (6 * m + 2 * a + 2 * k + 4 * f + heads + 2)
        head = FLOAT * 3 * m
    kept = layers * m * FLOAT + layer if checkpointing else layers * layer
    logits = v * ((2 if low else FLOAT) + 2 * FLOAT) if with_logits else 0
    return tokens * (kept + head + logits)


def _numel(part: torch.nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [child for part in model.modules() if isinstance(part, torch.nn.ModuleList) for child in part]
