"""Training of a causal LM to read compressed contexts: spans folded into sentinels, or a baseline with a shorter past.

Letters: B batch, T original tokens, S columns of a row with sentinels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.optimization import Optimization
from lightning_modules.sentinel_setup import MergedModel, build_compressed_model, save_adapter
from lightning_modules.summed_loss import SummedLossModule
from losses.distillation import distillation_loss
from losses.output_head import evaluation_mode
from patches.compressed_rows import (
    Compression,
    Method,
    forward_under,
    label_nll,
    labels_inside_documents,
    plain_rows,
)
from patches.rules_kinds import PAD
from patches.sentinel import SpanLayout, recurrent_forward
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
        schedule: Literal["linear", "constant"] = "constant" if max_steps is None else "linear"
        super().__init__(
            lambda: build_compressed_model(
                model,
                sentinels=sentinels,
                lora=lora,
                train_rows=train_rows and method == "sentinel",
                seed=seed,
                row_init=row_init,
            ),
            optimization=Optimization(
                lr=learning_rate,
                betas=(0.9, 0.999),
                weight_decay=weight_decay,
                decay="all",
                schedule=schedule,
                warmup_steps=warmup_steps,
            ),
            max_steps=max_steps,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.compression = Compression(method, compression_ratio, num_sinks, window_size)
        self.mixture = tuple(mixture)
        self.sentinels, self.training_mode, self.chunk_size = sentinels, training_mode, chunk_size
        self.distillation_weight, self.temperature = distillation_weight, distillation_temperature
        self.exclude = sentinels if exclude_sentinel_logits else None
        self.published_labels = published_labels
        self._check_options(has_adapters=lora is not None)
        if isinstance(model, PreTrainedModel):
            self.configure_model()

    def _check_options(self, *, has_adapters: bool) -> None:
        sentinel = self.compression.method == "sentinel"
        if sentinel and self.sentinels is None:
            raise ValueError("method='sentinel' needs sentinels: pass what add_sentinels returned")
        if self.training_mode not in ("masked", "recurrent"):
            raise ValueError(f"training_mode is one of masked, recurrent, got {self.training_mode!r}")
        if self.training_mode == "recurrent" and not sentinel:
            raise ValueError("training_mode='recurrent' is for method='sentinel': baselines train masked")
        if self.training_mode == "recurrent" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing drops the cache that training_mode='recurrent' needs: use masked")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if self.distillation_weight < 0 or not self.temperature > 0:
            raise ValueError(
                "distillation_weight must be at least 0 and distillation_temperature above 0, "
                f"got {self.distillation_weight} and {self.temperature}"
            )
        if self.distillation_weight and not has_adapters:
            raise ValueError("distillation learns from the model without its adapters: pass lora, not None")
        if self.published_labels and (not sentinel or self.exclude is not None):
            raise ValueError(
                "published_labels may ask for a sentinel: they need method='sentinel' and exclude_sentinel_logits=False"
            )

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
        teacher = self.teacher_logits(layout, batch.get("document_ids")) if self.distillation_weight else None
        logits = self.logits(layout, batch)
        loss_sum = label_nll(logits, labels, exclude=self.exclude).sum()
        metrics = {"nll_sum": loss_sum.detach(), "achieved_ratio": layout.achieved_ratio.mean().float()}
        if teacher is not None:
            kl_sum, count = self.divergence(logits, teacher, layout)
            loss_sum = loss_sum + self.distillation_weight * kl_sum
            metrics["divergence"] = kl_sum.detach() / count.clamp(min=1)
        return loss_sum, (labels[:, 1:] != IGNORED).sum(), metrics

    def rows(self, batch: Mapping[str, Tensor]) -> tuple[SpanLayout, Tensor]:
        """Return the layout of a batch and its labels [B, S]."""
        if self.compression.method != "sentinel":
            layout = plain_rows(batch["input_ids"], batch.get("attention_mask"))
        elif "kind" in batch and "span" in batch:
            layout = SpanLayout(batch["input_ids"], batch["kind"], batch["span"], batch.get("forget"))
        else:
            raise ValueError("method='sentinel' needs kind and span in the batch: use datamodules.sentinel")
        if self.published_labels:
            return layout, layout.published_labels
        documents = batch.get("document_ids")
        return layout, layout.labels if documents is None else labels_inside_documents(layout, documents)

    def logits(self, layout: SpanLayout, batch: Mapping[str, Tensor]) -> Tensor:
        """Raw logits [B, S, V] under the method's rule."""
        documents = batch.get("document_ids")
        if self.training_mode == "recurrent" and self.training:
            if documents is not None:
                raise ValueError("training_mode='recurrent' keeps no documents apart: leave document_ids out")
            return recurrent_forward(self.model, layout, chunk_size=self.chunk_size)[0]
        compression = self.mixture[int(batch["ratio_index"])] if "ratio_index" in batch else self.compression
        rule = compression.rule(layout, keep=batch.get("keep"), document_ids=documents)
        return forward_under(self.model, layout, rule)

    @torch.no_grad()
    def teacher_logits(self, layout: SpanLayout, document_ids: Tensor | None) -> Tensor:
        """Logits [B, T, V] of the dense model, adapters off, on the original tokens."""
        at = layout.plain_index.clamp(min=0)
        rows = plain_rows(layout.input_ids.gather(1, at), layout.plain_index >= 0)
        documents = None if document_ids is None else document_ids.gather(1, at)
        with evaluation_mode(self.model), self.model.disable_adapter():
            return forward_under(self.model, rows, Compression("dense").rule(rows, document_ids=documents))

    def divergence(self, logits: Tensor, teacher: Tensor, layout: SpanLayout) -> tuple[Tensor, Tensor]:
        """Divergence of the student [B, S, V] from the teacher [B, T, V] where a token follows, and their number."""
        at = layout.plain_index[:, :-1].clamp(min=0)
        student = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
        excluded = () if self.exclude is None else self.exclude.ids
        follows = layout.plain_index[:, 1:] >= 0
        return distillation_loss(student, teacher[:, :-1], follows, temperature=self.temperature, exclude_ids=excluded)

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
