"""The work of scoring sequences: which shards are a rank's, which are left, and one decoder pass after the other.

Notable: every sequence is scored alone, so the bytes of a shard depend on the manifest only, not on who makes it.

Letters: C tokens of a sequence, T = C - 1 targets.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from datamodules.score_store import FORMAT, VERSION, Shard, shard_state, shards_of
from datamodules.sequence_store import SequenceStore
from preprocess.disk import full_disk_named
from preprocess.score_model import Scorer, choose_device, load_scorer
from preprocess.score_progress import ScoreProgress
from preprocess.score_shards import claim_folder, write_shard

if TYPE_CHECKING:
    import torch

Bos = Literal["replace", "none"]


@dataclass(frozen=True)
class Schedule:
    """Which short context every target is scored in.

    Attributes:
        base_length: tokens of a window.
        base_stride: distance of two windows.
        tail: what becomes of a last window that does not fit; see ``losses.base_scoring.plan_windows``.
        first_window: score the first window, too, where short and full context are the same.
        bos: ``"replace"`` puts the beginning-of-text token at the front of every window, ``"none"`` does not.
        bos_token_id: that token; None with ``bos="none"``.
    """

    base_length: int
    base_stride: int
    tail: Literal["align", "short", "strict"] = "align"
    first_window: bool = True
    bos: Bos = "none"
    bos_token_id: int | None = None


@dataclass(frozen=True)
class Run:
    """One process of the work.

    Attributes:
        output: score folder.
        shard_size: sequences of a shard.
        rank: this process; it owns the shards k with k mod world_size = rank.
        world_size: number of processes that share the work.
        limit_shards: stop after making so many.
        device: ``auto``, ``cpu`` or ``cuda``.
        local_rank: number of this process on its machine, which chooses the GPU.
        windows_per_forward: bound of the windows of a decoder pass; None puts all of a sequence in one.
    """

    output: Path
    shard_size: int = 256
    rank: int = 0
    world_size: int = 1
    limit_shards: int | None = None
    device: str = "auto"
    local_rank: int = 0
    windows_per_forward: int | None = None

    def __post_init__(self) -> None:
        for name in ("shard_size", "world_size", "limit_shards", "windows_per_forward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie between 0 and world_size - 1 = {self.world_size - 1}, got {self.rank}")


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        intact: shards of this rank that were there.
        made: shards made now.
        left: shards of this rank that ``limit_shards`` left out.
    """

    intact: int
    made: int
    left: int


def score_tokens(
    sequences: SequenceStore, scorer: Scorer, schedule: Schedule, *, run: Run, progress: ScoreProgress
) -> Outcome:
    """Score the sequences of this rank that are not scored yet.

    Raises:
        ValueError: impossible sizes, a folder with another manifest, or a model whose losses are not finite.
    """
    from losses.base_scoring import plan_windows

    windows = plan_windows(sequences.length, schedule.base_length, schedule.base_stride, schedule.tail)
    if len(windows) == 1 and not schedule.first_window:
        raise ValueError(
            f"sequences of {sequences.length} tokens have no window but the first of {schedule.base_length}: "
            "use a smaller --base-length, or leave out --no-first-window"
        )
    check_reach(sequences, scorer, longest=max(window.end - window.start for window in windows))
    device = choose_device(run.device, dtype=scorer.options.dtype, local_rank=run.local_rank)
    with full_disk_named(run.output):
        manifest_id = claim_folder(run.output, manifest_of(sequences, scorer, schedule, shard_size=run.shard_size))
    mine = shards_of(len(sequences), run.shard_size)[run.rank :: run.world_size]
    open_shards = [shard for shard in mine if shard_state(run.output, shard, manifest_id, full=True) != "intact"]
    wanted = open_shards[: run.limit_shards]
    if wanted:
        model = load_scorer(scorer, device)
        progress.start(sum(shard.rows for shard in wanted))
        for shard in wanted:
            started = time.monotonic()
            scores = score_shard(model, sequences, shard=shard, schedule=schedule, run=run, progress=progress)
            about = {"host": socket.gethostname(), "seconds": round(time.monotonic() - started, 3), **versions()}
            with full_disk_named(run.output, keeps=run.output):
                write_shard(run.output, shard, scores, manifest_id=manifest_id, about=about)
    return Outcome(len(mine) - len(open_shards), len(wanted), len(open_shards) - len(wanted))


def manifest_of(sequences: SequenceStore, scorer: Scorer, schedule: Schedule, *, shard_size: int) -> dict[str, Any]:
    """Return the plain values that decide every byte of the scores."""
    manifest = {"format": FORMAT, "version": VERSION, "sequences": sequences.store_id, "shard_size": shard_size}
    return {**manifest, **scorer.identity, "schedule": vars(schedule)}


def check_reach(sequences: SequenceStore, scorer: Scorer, *, longest: int) -> None:
    """Raise ValueError if the model cannot read the tokens or the longest window."""
    largest, name = int(sequences.meta["max_token_id"]), scorer.options.model
    if largest >= scorer.vocab_size:
        raise ValueError(
            f"the sequences hold token {largest}, but {name} knows {scorer.vocab_size}: they were made with another "
            "tokenizer"
        )
    if scorer.max_positions is not None and longest > scorer.max_positions:
        raise ValueError(
            f"windows of {longest} tokens exceed the {scorer.max_positions} positions of {name}: use a smaller "
            "--base-length, or --rope-theta for a model that is extended"
        )


def score_shard(
    model: Any,
    sequences: SequenceStore,
    *,
    shard: Shard,
    schedule: Schedule,
    run: Run,
    progress: ScoreProgress,
) -> npt.NDArray[np.float32]:
    """Return the scores of a shard, float32 [rows, T]; exactly the valid targets that the schedule scores have one.

    Raises:
        ValueError: a score is not finite; the sequence is named.
    """
    scores = np.empty((shard.rows, sequences.length - 1), np.float32)
    unscored = 0 if schedule.first_window else schedule.base_length - 1
    for row in range(shard.rows):
        item = sequences[shard.first + row]
        found = score_sequence(model, item["input_ids"], valid=item["valid"], schedule=schedule, run=run)
        scores[row] = found.numpy()
        expected = item["valid"].numpy().copy()
        expected[:unscored] = False
        if not np.array_equal(np.isfinite(scores[row]), expected):
            raise ValueError(
                f"the model gives losses that are not finite for sequence {shard.first + row}: score with "
                "--dtype float32, or check the model"
            )
        progress.scored(int(sequences.index[shard.first + row, 2]))
    return scores


def score_sequence(
    model: Any, input_ids: torch.Tensor, *, valid: torch.Tensor, schedule: Schedule, run: Run
) -> torch.Tensor:
    """Score one sequence [C] with its valid targets [T]; return float32 [T] on the CPU."""
    from losses.base_scoring import score_base_nll

    device = next(model.parameters()).device
    scores = score_base_nll(
        model,
        input_ids[None].to(device),
        valid=valid[None].to(device),
        base_length=schedule.base_length,
        base_stride=schedule.base_stride,
        tail=schedule.tail,
        first_window=schedule.first_window,
        bos_token_id=schedule.bos_token_id,
        windows_per_forward=run.windows_per_forward,
    )
    return scores[0].cpu()


def versions() -> dict[str, str]:
    """Return the versions that a score may depend on in its last bits."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
