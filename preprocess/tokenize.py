"""Tokenise text into a corpus folder: python -m preprocess.tokenize SOURCE --tokenizer NAME --output PATH."""

from __future__ import annotations

import argparse
from pathlib import Path

from preprocess.command import add_reading_options, reading_options, run_command
from preprocess.documents import TRAIN, VALIDATION, Source
from preprocess.folders import output_folder, refuse_output_inside
from preprocess.job import Outcome, Work, tokenize
from preprocess.progress import TokenizeProgress
from preprocess.sources import open_source

EXAMPLES = """examples:
  python -m preprocess.tokenize python_stdlib --tokenizer bpe:4096 --output data/stdlib
  python -m preprocess.tokenize books/ --tokenizer gpt2 --output data/books --workers 8
  python -m preprocess.tokenize notes.jsonl.zst --tokenizer bytes --output data/notes --text-column body
  python -m preprocess.tokenize hub:emozilla/pg19 --tokenizer gpt2 --output data/pg19 --workers 16

A killed run is continued by the same command. Files whose names begin with train, validation (valid, val, dev) or
test, or that lie in folders called so, are split by name; otherwise a share of the documents is held out.
"""


def add_work_options(parser: argparse.ArgumentParser, *, tokenizer: str | None = None) -> None:
    """Add the options of the work itself; ``tokenizer`` is the default one."""
    parser.add_argument(
        "--tokenizer",
        required=tokenizer is None,
        default=tokenizer,
        help="bytes, bpe:SIZE (trained on the training split first), a folder, a tokenizer.json or a hub name",
    )
    parser.add_argument("--output", type=output_folder, required=True, help="corpus folder to make")
    parser.add_argument(
        "--workers", type=int, default=1, help="encoding processes (default: 1); the result is the same"
    )
    parser.add_argument("--dtype", choices=("uint16", "uint32"), help="of the ids (default: the smallest that fits)")
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with the end-of-text token")
    parser.add_argument("--limit-documents", type=int, help="take only so many documents of each split")
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus at --output")


def run_work(source: Source, options: argparse.Namespace) -> None:
    """Tokenise a source as the options say, and print what came of it."""
    refuse_output_inside(options.source, options.output)
    work = Work(
        source=source,
        tokenizer=options.tokenizer,
        output=options.output,
        dtype=options.dtype,
        append_eos=not options.no_eos,
        num_workers=options.workers,
        overwrite=options.overwrite,
    )
    with TokenizeProgress(source.name, source.num_parts) as progress:
        outcome = tokenize(work, progress)
    print(summary(options.output, outcome))


def summary(output: Path, outcome: Outcome) -> str:
    """Say in a few lines what the corpus folder holds."""
    notes = ["already there, nothing to do"] if outcome.was_there else []
    notes += [f"continued after {outcome.resumed_at:,} documents"] if outcome.resumed_at else []
    notes += [f"{outcome.skipped:,} empty documents left out"] if outcome.skipped else []
    notes += [f"no {split} split" for split in (TRAIN, VALIDATION) if split not in outcome.metas]
    lines = [f"{output}: {'; '.join(notes) or 'done'}"]
    for split, meta in outcome.metas.items():
        counts = f"{meta['num_documents']:,} documents, {meta['num_tokens']:,} tokens ({meta['dtype']})"
        lines.append(f"  {split}: {counts}, vocabulary {meta['vocab_size']:,}, identity {meta['identity'][:12]}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Tokenise any source."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.tokenize",
        description="Tokenise text into a corpus folder (train/, validation/, test/, tokenizer/).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", help="folder or file (.txt .md .py .jsonl[.gz|.zst] .parquet ...), hub:NAME[:config] or python_stdlib"
    )
    add_work_options(parser)
    add_reading_options(parser)
    options = parser.parse_args(arguments)
    source = open_source(options.source, reading_options(options), limit_documents=options.limit_documents)
    run_work(source, options)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
