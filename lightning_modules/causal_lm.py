"""The shared base of every training method: one Hugging Face causal LM, AdamW, a schedule, exact randomness.

Notable: the loss of an optimiser step is the sum over its targets, of all ranks and micro-batches, divided by their
number. The global random state is set anew for every micro-batch from (seed, step, micro-batch, rank): what is random
is a function of the position in the run, and a resumed run draws what the uninterrupted one would have drawn.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kernels.context_parallel import SequencePart
from lightning_modules.batch_targets import labels_inside_documents, num_targets
from lightning_modules.optimization import Optimization
from lightning_modules.optimized_module import OptimizedModule
from lightning_modules.packed_rows import document_inputs
from lightning_modules.sequence_split import SequenceSplit
from lightning_modules.sharding import shard_module
from lightning_modules.step_targets import StepTargets
from lightning_modules.stored_model import StoredModel


class CausalLMModule(OptimizedModule, StoredModel):
    """Next-token training and validation of a Hugging Face causal LM.

    Args:
        model: builds the model; called once, in ``configure_model``, under the run's seed.
        optimization: optimiser and schedule.
        max_steps: optimiser steps of the whole run, the schedule's length; a constant one needs none.
        seed: seed of initial weights and of all randomness in training steps.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: ``torch.compile`` the model in place.

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
        super().__init__(optimization, max_steps)
        self.build_model, self.seed = model, seed
        self.gradient_checkpointing, self.compile_model = gradient_checkpointing, compile
        self.step_targets, self.split = StepTargets(), SequenceSplit()

    def configure_model(self) -> None:
        """Build the model once; Lightning may call this hook more than once."""
        if hasattr(self, "model"):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = self.build_model()
        self.identify_frozen()  # now, before an engine rounds or splits them
        self.model.train()
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.compile_model:
            self.model.compile()
        strategy = None if self._trainer is None else self._trainer.strategy
        group = getattr(strategy, "sequence_group", None)
        self.split = SequenceSplit.over(group, self.model, problem=self.splitting_problem())
        if self._device_mesh is not None:
            shard_module(self, self.model)

    def splitting_problem(self) -> str | None:
        """Why no training step could compute a part of a sequence that several processes share; None: it can."""
        return "module.compile=true needs whole sequences" if self.compile_model else None

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, Any]:
        """Return the share of the step's loss that this micro-batch is, its detached ``nll_sum``, ``num_targets``."""
        self.seed_micro_batch(batch_idx)
        targets = num_targets(batch)
        factor = self.step_factor(batch, targets, batch_idx)
        own, options = self.split.own(batch), self.train_options(batch)
        if own.part is None:
            labels, divisor = labels_inside_documents(batch), 1 / factor
            inputs = self.model_inputs(batch) | options
            outputs = self.model(**inputs, labels=labels, use_cache=False, num_items_in_batch=divisor)
            loss, nll_sum = outputs.loss, outputs.loss.detach() * divisor
        else:
            outputs = self.model(**own.model_inputs(), **options)
            nll, counted = own.nll(outputs.logits)
            loss, nll_sum, targets = nll.sum() * factor, nll.detach().sum(), counted.sum()
        self.watch_outputs(outputs, own.part)
        return {"loss": loss, "nll_sum": nll_sum, "num_targets": targets}

    def step_factor(self, batch: dict[str, torch.Tensor], targets: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """What a sum of losses is multiplied by, so that the step is divided by its targets, see `StepTargets`."""
        return self.step_targets.factor(
            batch,
            targets,
            accumulate=self.trainer.accumulate_grad_batches,
            num_ranks=self.trainer.world_size,
            num_copies=self.split.num_copies,
            # A fast_dev_run stops inside the announced step.
            last=self.ends_step(batch_idx) and not self.trainer.fast_dev_run,
        )

    def ends_step(self, batch_idx: int) -> bool:
        """Whether the optimiser steps after this micro-batch: the window is full, or the epoch ends."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch

    def train_options(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Further arguments of the model in a training step; methods add theirs here."""
        return {}

    def watch_outputs(self, outputs: Any, part: SequencePart | None) -> None:
        """Look at the outputs of a training step, to log; methods add theirs here."""

    def validation_step(
        self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return per-token scores: ``nll`` float32 [B, T] and ``counted`` bool [B, T]."""
        own = self.split.own_or_whole(batch)
        inputs = self.model_inputs(own.batch) if own.part is None else own.model_inputs()
        nll, counted = own.nll(self.model(**inputs, use_cache=False).logits)
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
