"""The shared base of every training method: one Hugging Face causal LM, AdamW, a schedule, exact randomness.

Notable: the loss of an optimiser step is the sum over its targets, of all ranks and micro-batches, divided by their
number. The global random state is set anew for every micro-batch from (seed, step, micro-batch, rank): what is random
is a function of the position in the run, and a resumed run draws what the uninterrupted one would have drawn.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from transformers import PreTrainedModel

from lightning_modules.adapter_checkpoint import frozen_identity, leave_frozen_out, put_frozen_back
from lightning_modules.batch_targets import labels_inside_documents, num_targets
from lightning_modules.lora import MergedModel, has_adapters, save_adapter
from lightning_modules.model_identity import refuse_other_model
from lightning_modules.optimization import Optimization, decay_groups, group_options, total_grad_norm
from lightning_modules.packed_rows import document_inputs
from lightning_modules.sharding import shard_module, whole
from lightning_modules.step_targets import StepTargets
from losses.cross_entropy import next_token_nll


class CausalLMModule(pl.LightningModule):
    """Next-token training and validation of a Hugging Face causal LM.

    Args:
        model: builds the model; called once, in ``configure_model``, under the run's seed.
        optimization: optimiser and schedule.
        max_steps: optimiser steps of the whole run, the schedule's length; a constant one needs none.
        seed: seed of initial weights and of all randomness in training steps.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: ``torch.compile`` the model in place.

    Attributes:
        frozen_identity: which weights the adapters stand on, of which checkpoints hold none; None without adapters.

    Raises:
        ValueError: a schedule that ends, without ``max_steps``.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: Callable[[], PreTrainedModel],
        *,
        optimization: Optimization,
        max_steps: int | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        optimization.check_length(max_steps)
        self.build_model = model
        self.optimization = optimization
        self.max_steps, self.seed = max_steps, seed
        self.gradient_checkpointing, self.compile_model = gradient_checkpointing, compile
        self.grad_norm: torch.Tensor | None = None
        self.frozen_identity: str | None = None
        self.step_targets = StepTargets()

    def configure_model(self) -> None:
        """Build the model once; Lightning may call this hook more than once."""
        if hasattr(self, "model"):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = self.build_model()
        if has_adapters(self.model):  # now, before an engine rounds or splits what is frozen
            self.frozen_identity = frozen_identity(self)
        self.model.train()
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.compile_model:
            self.model.compile()
        if self._device_mesh is not None:
            shard_module(self, self.model)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, Any]:
        """Return the share of the step's loss that this micro-batch is, its detached ``nll_sum``, ``num_targets``."""
        self.seed_micro_batch(batch_idx)
        targets = num_targets(batch)
        divisor = 1 / self.step_factor(batch, targets, batch_idx)
        outputs = self.model(
            **self.model_inputs(batch),
            labels=labels_inside_documents(batch),
            use_cache=False,
            num_items_in_batch=divisor,
            **self.train_options(batch),
        )
        self.watch_outputs(outputs)
        return {"loss": outputs.loss, "nll_sum": outputs.loss.detach() * divisor, "num_targets": targets}

    def step_factor(self, batch: dict[str, torch.Tensor], targets: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """What a sum of losses is multiplied by, so that the step is divided by its targets, see `StepTargets`."""
        return self.step_targets.factor(
            batch,
            targets,
            accumulate=self.trainer.accumulate_grad_batches,
            num_ranks=self.trainer.world_size,
            # A fast_dev_run stops inside the announced step.
            last=self.ends_step(batch_idx) and not self.trainer.fast_dev_run,
        )

    def ends_step(self, batch_idx: int) -> bool:
        """Whether the optimiser steps after this micro-batch: the window is full, or the epoch ends."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch

    def train_options(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Further arguments of the model in a training step; methods add theirs here."""
        return {}

    def watch_outputs(self, outputs: Any) -> None:
        """Look at the outputs of a training step, to log; methods add theirs here."""

    def validation_step(
        self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return per-token scores: ``nll`` float32 [B, T] and ``counted`` bool [B, T]."""
        logits = self.model(**self.model_inputs(batch), use_cache=False).logits
        nll, counted = next_token_nll(
            logits, batch["labels"], next_token=batch.get("next_token"), document_ids=batch.get("document_ids")
        )
        return {"nll": nll, "counted": counted}

    def model_inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keep the entries of a batch that are arguments of the model; documents as the model keeps them apart."""
        kept: dict[str, torch.Tensor] = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        return kept | document_inputs(self.model, batch) if "document_ids" in batch else kept

    def seed_micro_batch(self, batch_idx: int) -> None:
        """Set the random state of this micro-batch from (seed, step, micro-batch, rank)."""
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        key = [self.seed, self.global_step, micro_batch, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW (fused) with decay groups; `on_train_batch_start` sets its learning rate."""
        o = self.optimization
        groups = decay_groups(self.model, o.weight_decay, o.decay)
        # Lightning refuses to clip the gradients of a fused optimiser under autocast.
        fused = self._trainer is None or not str(self._trainer.precision).endswith("mixed")
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=fused)
        self.group_options = group_options(optimizer)
        return optimizer

    def on_train_start(self) -> None:
        """Put this run's options in force: a checkpoint brings those that it was saved under."""
        for group, options in zip(self.trainer.optimizers[0].param_groups, self.group_options, strict=True):
            group.update(options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the coming step, also where a prolonged run follows a longer schedule."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.optimization.lr_at(self.global_step + 1, self.max_steps)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient norm (before clipping), then clip as the trainer is told.

        DeepSpeed holds the gradients itself, and clips them; it tells their norm after the step.
        """
        self.grad_norm = whole(total_grad_norm(self.model.parameters()))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def model_to_export(self) -> Any:
        """What a finished run saves with ``save_pretrained``: the model, adapters added to its weights."""
        return MergedModel(self.model) if has_adapters(self.model) else self.model

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapters in PEFT's format.

        Raises:
            ValueError: the model has none.
        """
        save_adapter(self.model, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model's configuration beside its weights; of a model with adapters only what training changes."""
        checkpoint["model_config"] = self.model.config.to_json_string(use_diff=False)
        if self.frozen_identity is not None:
            leave_frozen_out(self, checkpoint, self.frozen_identity)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; put frozen weights back that it leaves out.

        Raises:
            ValueError: its configuration, its tensors or the weights that its adapters stand on are not those of this
                model.
        """
        put_frozen_back(self, checkpoint, self.frozen_identity)
        refuse_other_model(self, checkpoint)
