"""Score the tokens of a corpus to choose spans by: python -m preprocess.span_scores CORPUS --model M --output DIR."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datamodules.corpus import open_split
from preprocess.command import run_command
from preprocess.documents import SPLITS, TRAIN, VALIDATION
from preprocess.folders import output_folder
from preprocess.progress import TokenizeProgress
from preprocess.score_model import DTYPES, ScorerOptions, find_scorer
from preprocess.span_score_job import SpanScoring, score_spans

EXAMPLES = """examples:
  python -m preprocess.span_scores data/wikitext2 --model models/gpt2 --output data/wikitext2-losses
  python train.py recipe=wikitext2_sentinel_lora data.path=data/wikitext2 data.sampler.policy=low_information \\
      data.span_scores=data/wikitext2-losses

The corpus must be tokenised with the tokenizer of the model. A killed run is continued by the same command;
python -m preprocess.verify DIR checks what it wrote.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.span_scores",
        description="Write the loss of every token of a corpus under a fixed model, for data.span_scores.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", type=Path, help="corpus folder")
    parser.add_argument("--output", type=output_folder, required=True, help="folder to make")
    parser.add_argument(
        "--split", nargs="+", default=(TRAIN, VALIDATION), choices=SPLITS, help="default: train validation"
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a Hugging Face causal LM")
    parser.add_argument("--adapter", help="folder or hub name of a PEFT adapter")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--attention", default="sdpa", help="sdpa, eager, flash_attention_2, ... (default: sdpa)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--context-length", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument("--stride", type=int, help="distance of two windows (default: half a window)")
    parser.add_argument(
        "--windows-per-forward", type=int, default=8, help="bound of the windows of a pass (default: 8)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other scores at --output")
    return parser


def summary(output: Path, meta: dict[str, Any], *, was_there: bool) -> str:
    """Say in a few lines what the folder holds."""
    lines = [f"{output}: {'already there, nothing to do' if was_there else 'done'}"]
    lines += [f"  {split}: {entry['num_tokens']:,} tokens" for split, entry in meta["splits"].items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Score the splits of a corpus."""
    options = make_parser().parse_args(arguments)
    corpora = {split: open_split(options.corpus, split) for split in dict.fromkeys(options.split)}
    scorer = ScorerOptions(options.model, options.adapter, dtype=options.dtype, attention=options.attention)
    work = SpanScoring(
        corpora,
        find_scorer(scorer),
        options.output,
        context_length=options.context_length,
        stride=max(1, options.context_length // 2) if options.stride is None else options.stride,
        device=options.device,
        windows_per_forward=options.windows_per_forward,
        overwrite=options.overwrite,
    )
    with TokenizeProgress(f"{options.output.name}: scoring", len(corpora), counted="splits done") as progress:
        meta, was_there = score_spans(work, progress)
    print(summary(options.output, meta, was_there=was_there))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
