"""Long-context fine-tuning with a weight for every token, from its losses with long and with short context.

Notable: the gradient of an optimiser step is that of ``sum(w_t L_t) / N`` over all ranks, micro-batches and valid
targets, N being the valid targets of the whole step, whatever the number of ranks or the lengths of the rows.

Letters: B batch, C tokens, T = C - 1 targets, M model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.fine_tuning import build_model, mixed_seed
from lightning_modules.optimization import Optimization
from lightning_modules.short_contexts import ShortContexts
from lightning_modules.summed_loss import SummedLossModule
from lightning_modules.weighting_choice import as_weighting
from lightning_modules.weighting_metrics import Sums, add_sums, reduce_sums, weighting_report, weighting_sums
from losses.base_scoring import unpack_scores
from losses.output_head import hidden_states, output_head, verify_head
from losses.token_weights import TokenWeighting, weighted_nll_sum

IGNORED = -100


class TokenWeightedLM(SummedLossModule):
    """Fine-tune a Hugging Face causal LM with weighted targets (token weighting, LongCE, PPMI, ...).

    Args:
        model: folder or hub name, a function that builds the model, or the model itself.
        weighting: a `TokenWeighting`, a mapping of its fields, or the name of a preset.
        scorer: ``self``: the model in training scores the short contexts; ``frozen``: the batch brings the scores.
        base_length: tokens of a short context.
        base_stride: distance of two short contexts.
        tail: what happens to a last window that does not fit, see `losses.base_scoring.plan_windows`.
        layout: how windows are laid out in the scoring pass, see `losses.base_scoring.score_base_nll`.
        windows_per_forward: bound of the windows scored at once.
        bos_token_id: token that replaces the first of every window in rows that begin with it.
        rope_theta: new rotary base, see `models.pretrained.override_rope`.
        context_length: new ``max_position_embeddings``.
        keep_rope_scaling: keep the model's rotary scaling when its base changes.
        lora: options of ``peft.LoraConfig``: only adapters train.
        chunk_size: rows of the output head at once.
        position_edges: borders of the position buckets of the logged cross entropy.
        seed: seed of random fillings and of everything random in a step.
        learning_rate: constant rate after warm-up.
        betas: AdamW moments.
        eps: AdamW epsilon.
        weight_decay: decoupled decay of all trained parameters.
        warmup_steps: steps of linear warm-up.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: ``torch.compile`` the model in place.

    Raises:
        ValueError: options that contradict each other, or a model whose logits cannot be computed from its head.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Callable[[], PreTrainedModel],
        weighting: TokenWeighting | Mapping[str, Any] | str,
        *,
        scorer: Literal["self", "frozen"] = "self",
        base_length: int = 8192,
        base_stride: int = 6144,
        tail: Literal["align", "short", "strict"] = "align",
        layout: Literal["auto", "batched", "packed"] = "auto",
        windows_per_forward: int | None = None,
        bos_token_id: int | None = None,
        rope_theta: float | None = None,
        context_length: int | None = None,
        keep_rope_scaling: bool = False,
        lora: Mapping[str, Any] | None = None,
        chunk_size: int | None = None,
        position_edges: Sequence[int] = (0, 8192, 16384, 32768),
        seed: int = 42,
        learning_rate: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ):
        rope = {"rope_theta": rope_theta, "context_length": context_length, "keep_rope_scaling": keep_rope_scaling}
        rates: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            lambda: build_model(model, lora=lora, **rope),
            optimization=Optimization(**rates, decay="all", schedule="constant", warmup_steps=warmup_steps),
            max_steps=None,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )
        if scorer not in ("self", "frozen"):
            raise ValueError(f"scorer is one of self, frozen, got {scorer!r}")
        self.weighting, self.scorer = as_weighting(weighting), scorer
        self.chunk_size, self.position_edges = chunk_size, tuple(position_edges)
        self.contexts = ShortContexts(
            base_length, base_stride, tail, layout, windows_per_forward, bos_token_id, chunk_size
        )
        self.sums: Sums | None = None
        if isinstance(model, PreTrainedModel):
            self.configure_model()
            verify_head(self.model)

    def on_train_start(self) -> None:
        """Make sure that the head computes the model's logits, once sharded weights can be gathered."""
        super().on_train_start()
        verify_head(self.model)

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Sums]:
        """Weighted loss of a micro-batch: score the short contexts, run the long one, weigh, add up.

        Args:
            batch: ``input_ids`` int64 [B, C], ``valid`` bool [B, T], ``sequence_index`` int64 [B] and, with
                ``scorer="frozen"``, ``base_nll_bits`` int32 [B, T].

        Returns:
            ``sum(w_t L_t)`` float32, the number of valid targets, and detached sums that describe them.

        Raises:
            ValueError: a frozen scorer without scores in the batch.
        """
        input_ids, valid = batch["input_ids"], batch["valid"]
        base_nll = self.base_nll(batch)
        nll = self.target_nll(input_ids, valid)
        weights = self.weighting.weights(nll.detach(), base_nll, valid, generator=self.generators(batch))
        loss_sum, num_targets = weighted_nll_sum(nll, weights, valid)
        return loss_sum, num_targets, weighting_sums(nll, base_nll, weights, valid, edges=self.position_edges)

    def target_nll(self, input_ids: Tensor, valid: Tensor) -> Tensor:
        """Loss of every target with its full context, float32 [B, T]; 0 where ``valid`` is False."""
        hidden = hidden_states(self.model, input_ids)[:, :-1]
        targets = torch.where(valid, input_ids[:, 1:], IGNORED)
        nll = output_head(self.model).nll(hidden.flatten(0, 1), targets.flatten(), chunk_size=self.chunk_size)
        return nll.view_as(targets)

    def base_nll(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Loss of every target with a short context, float32 [B, T], NaN where there is none; None if not needed."""
        if not self.weighting.needs_base_nll:
            return None
        if self.scorer == "frozen":
            if "base_nll_bits" not in batch:
                raise ValueError("scorer=frozen needs scores in the batch: pass scores=FOLDER to the datamodule")
            return unpack_scores(batch["base_nll_bits"])
        strategy, valid = None if self._trainer is None else self._trainer.strategy, batch["valid"]
        parity = self.weighting.parity
        return self.contexts.nll(self.model, batch["input_ids"], valid, strategy=strategy, parity=parity)

    def generators(self, batch: Mapping[str, Tensor]) -> list[torch.Generator] | torch.Generator | None:
        """One generator for each row from (seed, sequence, step): neighbours and ranks change nothing."""
        if self.weighting.zero_fill != "random":
            return None
        made = [
            torch.Generator().manual_seed(mixed_seed(self.seed, index, self.global_step))
            for index in batch["sequence_index"].tolist()
        ]
        return made[0] if self.weighting.parity else made

    def watch_metrics(self, metrics: Sums, batch_idx: int) -> None:
        """Add up the sums of a step; log what they say at logging steps only: the ranks meet and the host waits."""
        self.sums = add_sums(self.sums, metrics)
        if not self.ends_step(batch_idx):
            return
        sums, self.sums = self.sums, None
        if (self.global_step + 1) % self.trainer.log_every_n_steps:
            return
        for name, value in weighting_report(reduce_sums(sums), edges=self.position_edges).items():
            self.log(f"train/{name}", value)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return unweighted scores: ``nll`` float32 [B, T] and ``counted`` bool [B, T]."""
        return {"nll": self.target_nll(batch["input_ids"], batch["valid"]), "counted": batch["valid"]}
