"""Score sequences in a short context: python -m preprocess.score_tokens --sequences DIR --model PATH --output DIR."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from datamodules.score_store import (
    MANIFEST_FILE,
    check_sequences,
    describe_problems,
    read_manifest,
    shard_states,
    shards_of,
    suspects,
)
from datamodules.sequence_store import SequenceStore
from preprocess.command import run_command
from preprocess.score_job import Bos, Outcome, Run, Schedule, score_tokens
from preprocess.score_model import DTYPES, ScorerOptions, find_scorer
from preprocess.score_progress import ScoreProgress

EXAMPLES = """examples:
  python -m preprocess.score_tokens --sequences data/books-32k --model models/llama --output data/books-32k-scores \\
      --base-length 8192 --base-stride 6144
  torchrun --nproc-per-node 8 -m preprocess.score_tokens ...      (every process takes every eighth shard)
  python -m preprocess.score_tokens --sequences data/books-32k --output data/books-32k-scores --verify

A killed run is continued by the same command, and any rank can be run again, alone and at any time. --verify and
--status look at the folder as it is: they need --sequences and --output only.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.score_tokens",
        description="Score every target of a sequence store in a short context by a fixed model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sequences", type=Path, required=True, help="sequence store")
    parser.add_argument("--output", type=Path, required=True, help="score folder to make or continue")
    _add_model_options(parser.add_argument_group("model"))
    _add_schedule_options(parser.add_argument_group("short context"))
    work = parser.add_argument_group("work")
    work.add_argument("--shard-size", type=int, default=256, help="sequences of a shard (default: 256)")
    work.add_argument("--windows-per-forward", type=int, help="bound of the windows of a pass (default: all of a row)")
    work.add_argument("--limit-shards", type=int, help="stop after making so many shards")
    work.add_argument("--rank", type=int, help="this process (default: RANK, else 0)")
    work.add_argument("--world-size", type=int, help="processes that share the work (default: WORLD_SIZE, else 1)")
    reports = parser.add_mutually_exclusive_group()
    reports.add_argument("--verify", action="store_true", help="hash all shards; exit 1 if one is missing or corrupt")
    reports.add_argument("--status", action="store_true", help="say what is there, without hashing")
    return parser


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="folder or hub name of a Hugging Face causal LM")
    group.add_argument("--adapter", help="folder or hub name of a PEFT adapter")
    group.add_argument("--rope-theta", type=float, help="rotary base instead of the model's, without its scaling")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    group.add_argument("--attention", default="sdpa", help="sdpa, eager, flash_attention_2, ... (default: sdpa)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_schedule_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-length", type=int, help="tokens of a window")
    group.add_argument("--base-stride", type=int, help="distance of two windows")
    group.add_argument(
        "--tail",
        choices=("align", "short", "strict"),
        default="align",
        help="a last window that does not fit is moved back (align), cut off (short) or refused (strict)",
    )
    group.add_argument(
        "--bos",
        choices=get_args(Bos),
        help="the first token of every window becomes the beginning-of-text token of the sequences, or stays "
        "(default: replace if the sequences have one)",
    )
    group.add_argument(
        "--no-first-window", action="store_true", help="leave out the targets whose full context is the short one"
    )


def schedule_of(options: argparse.Namespace, sequences: SequenceStore) -> Schedule:
    """Return the schedule that the options ask for.

    Raises:
        ValueError: ``--bos replace`` for sequences without such a token.
    """
    bos: Bos = options.bos or ("none" if sequences.bos_token_id is None else "replace")
    if bos == "replace" and sequences.bos_token_id is None:
        raise ValueError(f"{sequences.path} has no beginning-of-text token: --bos replace needs one, use --bos none")
    return Schedule(
        base_length=options.base_length,
        base_stride=options.base_stride,
        tail=options.tail,
        first_window=not options.no_first_window,
        bos=bos,
        bos_token_id=sequences.bos_token_id if bos == "replace" else None,
    )


def scorer_options(options: argparse.Namespace) -> ScorerOptions:
    """Return what the options say about the model."""
    return ScorerOptions(
        options.model,
        options.adapter,
        rope_theta=options.rope_theta,
        dtype=options.dtype,
        attention=options.attention,
    )


def run_of(options: argparse.Namespace) -> Run:
    """Return this process's share; a launcher says it by ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``."""
    rank = _launched("RANK", 0) if options.rank is None else options.rank
    world_size = _launched("WORLD_SIZE", 1) if options.world_size is None else options.world_size
    return Run(
        output=options.output,
        shard_size=options.shard_size,
        rank=rank,
        world_size=world_size,
        limit_shards=options.limit_shards,
        device=options.device,
        local_rank=_launched("LOCAL_RANK", rank),
        windows_per_forward=options.windows_per_forward,
    )


def _launched(name: str, default: int) -> int:
    """Return a number that a launcher has put into the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name} must be a number, got {value!r}")
    return int(value)


def report(output: Path, sequences: SequenceStore, *, full: bool) -> bool:
    """Print which shards are there; say whether all are.

    Args:
        output: score folder.
        sequences: what it scores.
        full: hash them.

    Raises:
        ValueError: scores of other sequences, or a damaged manifest.
    """
    if not (output / MANIFEST_FILE).is_file():
        print(f"{output}: no scores")
        return False
    manifest, manifest_id = read_manifest(output)
    check_sequences(output, manifest, sequences.store_id)
    shards = shards_of(len(sequences), manifest["shard_size"])
    states = shard_states(output, shards, manifest_id, full=full)
    rows = sum(shard.rows for shard in shards if states[shard.number] == "intact")
    intact = sum(state == "intact" for state in states.values())
    kind = "intact" if full else "committed"
    print(f"{output}: {intact} of {len(shards)} shards {kind}, {rows:,} of {len(sequences):,} sequences")
    if problems := describe_problems(states):
        files = ", ".join(suspects(output, shards, states, manifest_id)[:3])
        print(f"  {problems}{f' (look at {files})' if files else ''}")
    return intact == len(shards)


def summary(output: Path, run: Run, outcome: Outcome, *, tokens_per_second: float) -> str:
    """Say in a line what a run has done."""
    notes = [f"{outcome.made} shards made at {tokens_per_second:,.0f} tokens/s" if outcome.made else "nothing to make"]
    notes += [f"{outcome.intact} were there"] if outcome.intact else []
    notes += [f"{outcome.left} left by --limit-shards"] if outcome.left else []
    return f"{output}: rank {run.rank} of {run.world_size}: {', '.join(notes)}"


def main(arguments: list[str]) -> None:
    """Score, verify or report."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    sequences = SequenceStore(options.sequences)
    if options.verify or options.status:
        if not report(options.output, sequences, full=options.verify) and options.verify:
            raise SystemExit(1)
        return
    missing = [name for name in ("model", "base_length", "base_stride") if getattr(options, name) is None]
    if missing:
        parser.error(f"to score, name {', '.join('--' + name.replace('_', '-') for name in missing)}")
    schedule, run = schedule_of(options, sequences), run_of(options)
    with ScoreProgress(options.output.name) as progress:
        scorer = find_scorer(scorer_options(options))
        outcome = score_tokens(sequences, scorer, schedule, run=run, progress=progress)
        speed = progress.tokens_per_second
    print(summary(options.output, run, outcome, tokens_per_second=speed))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
