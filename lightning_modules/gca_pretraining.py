"""GCA pre-training: the causal-LM base plus a look at what the model retrieves."""

from __future__ import annotations

from typing import Any

import torch

from kernels.gca.noise import row_seeds
from lightning_modules.causal_lm import CausalLMModule

Retrieval = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def retrieval_statistics(retrieval: Retrieval) -> dict[str, torch.Tensor]:
    """Summarise what the landmarks of a batch retrieved.

    Args:
        retrieval: per group (indices int32 [B, N, K], weights float32 [B, N, K]); row c belongs to the landmark of
            chunk c, index -1 marks an empty slot.

    Returns:
        Scalars over all groups: ``retrieval_entropy`` of the weights in nats (rows that retrieved something),
        ``retrieval_distance``, the weighted mean number of chunks looked back, and ``empty_slots``, a share.
    """
    indices = torch.stack([group[0] for group in retrieval])
    weights = torch.stack([group[1] for group in retrieval]).detach().float()
    filled = indices >= 0
    rows = filled.any(-1)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    chunk = torch.arange(indices.shape[-2], device=indices.device)[:, None]
    distance = ((chunk - indices) * weights * filled).sum(-1)
    num_rows = rows.sum().clamp(min=1)
    return {
        "retrieval_entropy": (entropy * rows).sum() / num_rows,
        "retrieval_distance": (distance * rows).sum() / num_rows,
        "empty_slots": 1 - filled.float().mean(),
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

    def watch_outputs(self, outputs: Any) -> None:
        """Log what the landmarks retrieved."""
        retrieval = getattr(outputs, "retrieval", None)
        if retrieval is not None:
            found = retrieval_statistics(retrieval)
            self.log_dict({f"gca/{name}": value for name, value in found.items()}, sync_dist=True)
