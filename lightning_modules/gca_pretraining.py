"""GCA pre-training: the causal-LM base plus a look at what the model retrieves."""

from __future__ import annotations

from typing import Any

import torch

from kernels.context_parallel import SequencePart
from kernels.gca.noise import row_seeds
from lightning_modules.causal_lm import CausalLMModule

Retrieval = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def retrieval_sums(retrieval: Retrieval, first_chunk: int = 0) -> torch.Tensor:
    """Add up what the landmarks of a batch retrieved.

    Args:
        retrieval: per group (indices int32 [B, N, K], weights float32 [B, N, K]); row c belongs to the landmark of
            chunk first_chunk + c, index -1 marks an empty slot.
        first_chunk: of the part of the sequence that these are.

    Returns:
        float64 ``[5]`` over all groups: entropies of the weights in nats, weighted means of the chunks looked back,
        rows that retrieved something, filled slots, slots.
    """
    indices = torch.stack([group[0] for group in retrieval])
    weights = torch.stack([group[1] for group in retrieval]).detach().double()
    filled = indices >= 0
    rows = filled.any(-1)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    chunk = first_chunk + torch.arange(indices.shape[-2], device=indices.device)[:, None]
    distance = ((chunk - indices) * weights * filled).sum(-1)
    slots = torch.full_like(entropy.sum(), filled.numel())
    return torch.stack([(entropy * rows).sum(), (distance * rows).sum(), rows.sum(), filled.sum(), slots])


def retrieval_statistics(sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means of `retrieval_sums` [5], of any number of batches and processes.

    Returns:
        Scalars: ``retrieval_entropy`` and ``retrieval_distance`` of a row that retrieved something, and
        ``empty_slots``, a share.
    """
    entropy, distance, rows, filled, slots = sums.unbind()
    return {
        "retrieval_entropy": entropy / rows.clamp(min=1),
        "retrieval_distance": distance / rows.clamp(min=1),
        "empty_slots": 1 - filled / slots.clamp(min=1),
    }


class GCAPretrainingModule(CausalLMModule):
    """Train a DRT with noisy retrieval and log retrieval statistics under ``gca/``."""

    def train_options(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Seed the noise of every sample by its number, so that no split of a step into batches and ranks shows.

        Ask for the retrieval at logging steps (packed rows have no single order of landmarks to report).
        """
        logging_step = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        return {
            "output_retrieval": logging_step and "document_ids" not in batch,
            "retrieval_generator": row_seeds(self.seed, batch["sample_index"]),
        }

    def watch_outputs(self, outputs: Any, part: SequencePart | None) -> None:
        """Log what the landmarks of all processes retrieved."""
        retrieval = getattr(outputs, "retrieval", None)
        if retrieval is not None:
            first_chunk = 0 if part is None else part.start // self.model.config.chunk_size
            sums = self.trainer.strategy.reduce(retrieval_sums(retrieval, first_chunk), reduce_op="sum")
            for name, value in retrieval_statistics(sums).items():
                self.log(f"gca/{name}", value.float())
