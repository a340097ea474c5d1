"""A recipe's own module and loss on tensors without data, for `memory_trace` to count.

B sequences, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from configuration.memory_trace import StepTrace, place_weights, trace_step, without_data
from configuration.precision import precision_of
from configuration.targets import build
from kernels.context_parallel import SequenceGroup
from lightning_modules.kv_compression import KVCompressionLM
from lightning_modules.sequence_split import SequenceSplit
from lightning_modules.summed_loss import SummedLossModule
from lightning_modules.token_weighting import TokenWeightedLM
from patches.compressed_rows import label_nll
from patches.rules import as_attention_mask
from patches.sentinel import SpanLayout

# Longer sequences are continued from this length and half of it: beyond it every token costs the same.
LONGEST = 32_768
# The same for models that walk through a sequence block by block, in blocks.
LONGEST_WALK = 4


def is_deepspeed(trainer: dict[str, Any]) -> bool:
    """Whether an engine holds the weights: it rounds all of them where others compute under autocast."""
    strategy = trainer.get("strategy")
    return isinstance(strategy, dict) and str(strategy.get("_target_", "")).endswith("DeepSpeed")


def on_gpu(trainer: dict[str, Any]) -> bool:
    """Whether a recipe is meant for a GPU; ``auto`` takes one where there is one."""
    kind = str(trainer.get("accelerator", "auto"))
    return kind not in ("cpu", "auto") or (kind == "auto" and torch.cuda.is_available())


def blank_module(config: dict[str, Any]) -> Any:
    """The Lightning module of a composed recipe with its model built, weights and adapters in the run's types.

    Of a model that is loaded only the configuration is read. The weights are on the meta device.
    """
    section, trainer = dict(config["module"]), config["trainer"]
    if "model" in section:
        section["model"] = _blank_model(config["model"])
    with torch.device("meta"):
        module = build(section, "module")
        module.identify_frozen = lambda: None  # there are no weights to look at
        module.configure_model()
    precision = precision_of(trainer)
    if precision.endswith("16-true") or (is_deepspeed(trainer) and precision != "32-true"):
        module.to(torch.bfloat16)
    return module


def _blank_model(section: dict[str, Any]) -> Callable[[], nn.Module]:
    if "path" not in section:
        made: Callable[[], nn.Module] = build(section, "model")
        return made
    from transformers import AutoModelForCausalLM

    from models.pretrained import load_config

    config = load_config(section["path"])
    dtype = section.get("dtype", "float32")
    given = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    return lambda: AutoModelForCausalLM.from_config(config, dtype=given or torch.float32)


def trace_module(module: Any, config: dict[str, Any], *, context_parallel_size: int = 1) -> StepTrace:
    """Count a micro-batch of a recipe.

    Args:
        module: what `blank_module` returned; its weights are put in places without data.
        config: the composed recipe.
        context_parallel_size: processes that share a sequence; the one with the last part is counted, which holds the
            chunks of all parts.
    """
    trainer = config["trainer"]
    low = precision_of(trainer).endswith("mixed") and not is_deepspeed(trainer)
    block = getattr(module.model.config, "block_width", None)
    longest = context_parallel_size * (LONGEST if block is None else LONGEST_WALK * block)
    length = config["data"].get("context_length") or config["module"]["context_length"]
    lengths = [length] if length <= longest else [longest // 2, longest]
    if context_parallel_size > 1:
        # The process with the last part, without the others.
        group = SequenceGroup(list(range(context_parallel_size)), context_parallel_size - 1, None)
        module.split = SequenceSplit.over(group, module.model, problem=module.splitting_problem())
    # What depends on the numbers of a batch is done before they are gone.
    steps = [_loss_of(module, _blank_batch(module, config["data"], tokens)) for tokens in lengths]
    with without_data(like_gpu=on_gpu(trainer)):
        place_weights(module)
        first, *more = [trace_step(module.model, step, low=low) for step in steps]
    return first.continued(more[0], 2 * length / longest - 2) if more else first


def _blank_batch(module: Any, data: dict[str, Any], length: int) -> dict[str, Any]:
    """What the modules here read of a batch, without padding or documents; spans as they are drawn."""
    rows, sampler = data["batch_size"], data.get("sampler")
    ids = torch.zeros(rows, length, dtype=torch.int64)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "valid": torch.ones(rows, length - 1, dtype=torch.bool),
        "base_nll_bits": torch.zeros(rows, length - 1, dtype=torch.int32),
        "keep": torch.ones(rows, length, dtype=torch.bool),
        "sequence_index": _Numbers(rows),
    }
    if data.get("method") == "sentinel" and sampler is not None:
        drawn = build(sampler, "data.sampler")
        spans = [drawn(length, slots=module.sentinels.slots, generator=random.Random(row)) for row in range(rows)]
        layout = SpanLayout.from_spans(ids, spans, module.sentinels)
        batch |= {"input_ids": layout.input_ids, "kind": layout.kind, "span": layout.span}
    return batch


class _Numbers:
    """Numbers of the rows, which are read as numbers."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def tolist(self) -> list[int]:
        """Return 0, 1, ..."""
        return list(range(self._rows))


def _loss_of(module: Any, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """The forward pass of a training step; short contexts are not scored, which needs less than what follows it."""
    if not isinstance(module, SummedLossModule):
        own = module.split.own(batch)
        if own.part is not None:
            noisy = getattr(module.model.config, "retrieval_noise", None) is not None
            seeds = {"retrieval_generator": torch.arange(len(batch["labels"]))} if noisy else {}
            return lambda: own.nll(module.model(**own.model_inputs(), **seeds).logits)[0].sum()
        options = {"labels": batch["labels"], "use_cache": False, "num_items_in_batch": torch.ones(())}
        return lambda: module.model(**module.model_inputs(batch), **options).loss
    if isinstance(module, TokenWeightedLM):
        module.scorer = "frozen"
    if isinstance(module, KVCompressionLM):
        return _compressed_loss(module, batch)
    return lambda: module.loss(batch)[0]


def _compressed_loss(module: KVCompressionLM, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """As `KVCompressionLM.loss`, rows and mask made beforehand; without the teacher, which keeps nothing."""
    layout, labels = module.rows(batch)
    keep = batch["keep"] if module.compression.method == "scattered" else None
    columns = torch.arange(layout.kind.shape[1]).expand_as(layout.kind)
    positions = layout.position_ids
    rule = module.compression.rule(layout, keep=keep)
    mask = as_attention_mask(module.model, rule, query_index=columns, query_position_ids=positions)
    inputs = {"input_ids": layout.input_ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    return lambda: label_nll(module.model(**inputs).logits, labels, exclude=module.exclude).sum()
