"""How the processes of a run share its data."""

from __future__ import annotations

import lightning.pytorch as pl


def num_data_ranks(trainer: pl.Trainer) -> int:
    """Number of processes with batches of their own; a strategy that splits the model feeds several with the same."""
    shares = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(shares.get("num_replicas", 1))
