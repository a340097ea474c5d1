"""Training of a causal LM to read compressed contexts: spans folded into sentinels, or a baseline with a shorter past.

Letters: B batch, T original tokens, S columns of a row with sentinels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.equal_calls import shares_weights
from lightning_modules.compressed_reading import CompressedReading
from lightning_modules.dense_teacher import DenseTeacher
from lightning_modules.optimization import linear_to_zero
from lightning_modules.sentinel_setup import MergedModel, build_compressed_model, save_adapter
from lightning_modules.summed_loss import SummedLossModule
from patches.compressed_rows import Compression, Method, label_nll
from patches.rules_kinds import PAD
from patches.sentinel import SpanLayout
from patches.sentinel.layout import IGNORED
from patches.sentinel.sentinels import Sentinels

LORA: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}


class KVCompressionLM(SummedLossModule):
    """Fine-tune a Hugging Face causal LM under the attention rule of a compression method.

    Args:
        model: folder or hub name, a function that builds the model, or the model itself (with rows for the sentinels).
        sentinels: their ids; a baseline needs none, and leaves them out of its predictions if it has some.
        method: ``sentinel`` or a baseline, see `patches.compressed_rows.Compression`.
        compression_ratio: fraction of entries removed; the rule of ``local``, elsewhere that of the data.
        training_mode: ``masked``: one pass under a mask; ``recurrent``: chunks over a cache that evicts.
        chunk_size: columns of a chunk in recurrent mode.
        lora: options of ``peft.LoraConfig``; None trains the whole model.
        distillation_weight: weight of the divergence from the dense model with its adapters off.
        distillation_temperature: of both distributions in it.
        num_sinks: first tokens that ``streaming`` keeps.
        window_size: keys that ``streaming`` keeps besides.
        row_init: what the sentinels' input rows start as, see `add_sentinels`.
        train_rows: train these rows besides the adapters; frozen rows are not in the adapter's file.
        mixture: what micro-batches that hold a ``ratio_index`` use instead, see `datamodules.sentinel`.
        exclude_sentinel_logits: take the sentinels out of every predicted distribution.
        published_labels: targets as published, which may be sentinels, see `SpanLayout.published_labels`.
        learning_rate: its peak; it falls linearly to 0 over ``max_steps``, or stays.
        weight_decay: decoupled decay of all trained parameters.
        warmup_steps: steps of linear warm-up.
        max_steps: optimiser steps of the run; None keeps the learning rate.
        seed: seed of new weights and of everything random in a step.
        gradient_checkpointing: recompute activations in the backward pass; masked mode only.

    Raises:
        ValueError: options that contradict each other, or a model that does not go with them.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Callable[[], PreTrainedModel],
        *,
        sentinels: Sentinels | None = None,
        method: Method = "sentinel",
        compression_ratio: float = 0.5,
        training_mode: Literal["masked", "recurrent"] = "masked",
        chunk_size: int = 256,
        lora: Mapping[str, Any] | None = LORA,
        distillation_weight: float = 0.0,
        distillation_temperature: float = 1.0,
        num_sinks: int = 4,
        window_size: int | None = None,
        row_init: Literal["mean", "zero"] = "mean",
        train_rows: bool = True,
        mixture: Sequence[Compression] = (),
        exclude_sentinel_logits: bool = True,
        published_labels: bool = False,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        max_steps: int | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ):
        super().__init__(
            lambda: build_compressed_model(
                model,
                sentinels=sentinels,
                lora=lora,
                train_rows=train_rows and method == "sentinel",
                seed=seed,
                row_init=row_init,
            ),
            optimization=linear_to_zero(learning_rate, weight_decay, warmup_steps=warmup_steps, max_steps=max_steps),
            max_steps=max_steps,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.compression = Compression(method, compression_ratio, num_sinks, window_size)
        self.reading = CompressedReading(
            self.compression,
            tuple(mixture),
            sentinels,
            training_mode,
            chunk_size,
            exclude_sentinel_logits,
            published_labels,
        )
        self.teacher = DenseTeacher(distillation_weight, distillation_temperature)
        self.sentinels, self.exclude = sentinels, self.reading.exclude
        if training_mode == "recurrent" and gradient_checkpointing:
            raise ValueError("gradient_checkpointing drops the cache that training_mode='recurrent' needs: use masked")
        if distillation_weight and lora is None:
            raise ValueError("distillation learns from the model without its adapters: pass lora, not None")
        if isinstance(model, PreTrainedModel):
            self.configure_model()

    def on_fit_start(self) -> None:
        """Refuse what would wait for ever: rows of other widths take other numbers of chunks."""
        if self.reading.training_mode == "recurrent" and shares_weights(self.trainer.strategy):
            raise ValueError("training_mode='recurrent' needs all weights in every process: use masked, or trainer=ddp")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return the share of the step's loss that this micro-batch is; its tokens, sentinels counted, padding not."""
        outputs = super().training_step(batch, batch_idx)
        return outputs | {"num_tokens": (batch["kind"] != PAD).sum()} if "kind" in batch else outputs

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch under the method's rule.

        Args:
            batch: ``input_ids`` int64 [B, S]; for ``sentinel`` ``kind`` and ``span`` [B, S]; for a baseline
                ``attention_mask`` [B, S] (optional) and, for ``scattered``, ``keep`` bool [B, S]; ``document_ids``
                [B, S] (optional) keeps documents apart.

        Returns:
            ``sum -log p + distillation_weight * divergence`` float32, the number of targets, and detached sums.
        """
        layout, labels = self.rows(batch)
        # First the teacher: switching adapters off and on must not come between a forward and its backward pass.
        dense = self.teacher.logits(self.model, layout, batch.get("document_ids")) if self.teacher.weight else None
        logits = self.logits(layout, batch)
        loss_sum = label_nll(logits, labels, exclude=self.exclude).sum()
        metrics = {"nll_sum": loss_sum.detach(), "achieved_ratio": layout.achieved_ratio.mean().float()}
        if dense is not None:
            kl_sum, count = self.teacher.divergence(logits, dense, layout, exclude=self.exclude)
            loss_sum = loss_sum + self.teacher.weight * kl_sum
            metrics["divergence"] = kl_sum.detach() / count.clamp(min=1)
        return loss_sum, (labels[:, 1:] != IGNORED).sum(), metrics

    def rows(self, batch: Mapping[str, Tensor]) -> tuple[SpanLayout, Tensor]:
        """Return the layout of a batch and its labels int64 [B, S]."""
        return self.reading.rows(batch)

    def logits(self, layout: SpanLayout, batch: Mapping[str, Tensor]) -> Tensor:
        """Raw logits [B, S, V] under the method's rule."""
        return self.reading.logits(self.model, layout, batch, in_chunks=self.training)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return scores of the original tokens: ``nll`` float32 [B, T] and ``counted`` bool [B, T]."""
        layout, labels = self.rows(batch)
        nll = label_nll(self.logits(layout, batch), labels, exclude=self.exclude)
        counted = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        at = layout.plain_index.clamp(min=0)
        scored = (layout.plain_index >= 0) & batch.get("scored", True)
        return {"nll": nll.gather(1, at) * scored, "counted": counted.gather(1, at) & scored}

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format, with ``sentinels.json``."""
        save_adapter(self.model, self.sentinels, folder)

    def model_to_export(self) -> Any:
        """The model with its adapters added, to be saved."""
        return MergedModel(self.model, self.sentinels)
