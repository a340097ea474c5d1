"""How the processes of a run share its data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

# Lightning asks for a reduction of what is reduced already; the maximum of equal numbers is each of them.
SAME_ON_ALL_RANKS: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max"}


def num_data_ranks(trainer: pl.Trainer) -> int:
    """Number of processes with batches of their own; a strategy that splits the model feeds several with the same."""
    shares = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(shares.get("num_replicas", 1))
