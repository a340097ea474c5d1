"""Documents with their summaries, tokenised: python -m preprocess.summarization SOURCE --tokenizer T --output DIR.

Notable: as a step of a recipe (`ensure_summaries`), processes that need the same stores wait for the one that makes
them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from datamodules.summary_store import SummaryStore, open_summaries, summary_splits
from preprocess.command import run_command
from preprocess.corpora import held_lock
from preprocess.folders import output_folder, refuse_output_inside
from preprocess.progress import TokenizeProgress
from preprocess.summary_job import SummaryOutcome, SummaryWork, make_summaries, work_identity
from preprocess.summary_sources import Columns, open_pairs
from preprocess.tokenizers import load_tokenizer

EXAMPLES = """examples:
  python -m preprocess.summarization hub:EdinburghNLP/xsum --tokenizer gpt2 --output data/xsum --workers 8
  python -m preprocess.summarization hub:abisee/cnn_dailymail:3.0.0 --tokenizer gpt2 --output data/cnn_dailymail
  python -m preprocess.summarization reports/ --document-column text --summary-column abstract \\
      --tokenizer runs/pg19_gca/model --output data/reports
  python -m preprocess.summarization python_stdlib --tokenizer bytes --output data/docstrings

Files are json lines (.jsonl, .gz, .zst), a json array, parquet, csv or arrow; the columns document and summary (XSum)
or article and highlights (CNN/DailyMail) are found by themselves. Names that begin with train, validation (valid, val,
dev) or test, or folders called so, tell the split; without a validation file one in twenty training pairs is held out.
"""


def ensure_summaries(
    path: str | Path,
    *,
    source: str | None = None,
    source_path: str | None = None,
    tokenizer: str | None = None,
    cache: str | Path = "data",
    document_column: str | None = None,
    summary_column: str | None = None,
    limit_pairs: int | None = None,
    skip_bad_rows: bool = False,
    num_workers: int = 1,
) -> str:
    """Return a folder of summaries for ``path``, making what is not there yet.

    Args:
        path: a folder of summaries (taken as it is), files (made into ``cache``), or a folder to make from ``source``.
        source: files, ``hub:NAME[:config]`` or ``python_stdlib``, made into ``path`` where nothing is there.
        source_path: the only ``path`` that is made from ``source``; None: any.
        tokenizer: ``bytes``, a folder, a file or a hub name; that of the model.
        cache: where what is made from files goes, under a name with its identity.
        document_column: column of the documents; None is found by the published names.
        summary_column: column of the summaries, likewise.
        limit_pairs: take only so many pairs of each split.
        skip_bad_rows: leave out rows with an empty text instead of stopping.
        num_workers: encoding processes.

    Raises:
        FileNotFoundError: nothing at ``path`` and no ``source`` for it.
        ValueError: no tokenizer is named, or the files are no pairs.
    """
    path = Path(path)
    if path.is_dir() and summary_splits(path):
        return str(path)
    if source_path is not None and path != Path(source_path):
        source = None
    if not path.exists() and source is None:
        elsewhere = f", or leave the path at {source_path}" if source_path else ""
        raise FileNotFoundError(f"no summaries at {path}: make them with python -m preprocess.summarization{elsewhere}")
    if tokenizer is None:
        raise ValueError(f"{path} is not tokenised yet: name the tokenizer of the model")
    columns = Columns(document_column, summary_column)
    with held_lock(path.with_name(f".{path.name}.lock") if not path.exists() else Path(cache) / ".summaries.lock"):
        if path.is_dir() and summary_splits(path):
            return str(path)
        given = open_pairs(path if path.exists() else str(source), columns, limit=limit_pairs)
        work = SummaryWork(given, tokenizer, path, skip_bad_rows=skip_bad_rows, num_workers=num_workers)
        if path.exists():
            name = f"{given.name}-{work_identity(work, load_tokenizer(tokenizer))[:12]}"
            work = replace(work, output=Path(cache) / name)
            refuse_output_inside(path, work.output)
        with TokenizeProgress(given.name, 1) as progress:
            make_summaries(work, progress)
    return str(work.output)


def evaluation_pairs(
    path: str | Path,
    *,
    split: str,
    tokenizer: str,
    document_column: str | None = None,
    summary_column: str | None = None,
    skip_bad_rows: bool = False,
) -> SummaryStore:
    """Open a split of summaries; files are tokenised first. Arguments and errors as `ensure_summaries`."""
    folder = ensure_summaries(
        path,
        tokenizer=tokenizer.removeprefix("hub:"),
        document_column=document_column,
        summary_column=summary_column,
        skip_bad_rows=skip_bad_rows,
    )
    return open_summaries(folder, split=split)


def describe(output: Path, outcome: SummaryOutcome) -> str:
    """Say in a few lines what was made."""
    notes = ["already there, nothing to do"] if outcome.was_there else ["done"]
    notes += [f"{outcome.skipped:,} bad rows left out"] if outcome.skipped else []
    lines = [f"{output}: {'; '.join(notes)}"]
    for split, meta in outcome.metas.items():
        tokens = ", ".join(f"{count:,} tokens of {name}" for name, count in meta["num_tokens"].items())
        lines.append(f"  {split}: {meta['num_pairs']:,} pairs, {tokens}, identity {meta['identity'][:12]}")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.summarization",
        description="Tokenise documents and their summaries into a folder (train/, validation/, test/, tokenizer/).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="file or folder of pairs, hub:NAME[:config] or python_stdlib")
    parser.add_argument("--tokenizer", required=True, help="that of the model: bytes, a folder, a file or a hub name")
    parser.add_argument("--output", type=output_folder, required=True, help="folder to make")
    parser.add_argument("--document-column", help="column of the documents (default: document or article)")
    parser.add_argument("--summary-column", help="column of the summaries (default: summary or highlights)")
    parser.add_argument("--max-summary-tokens", type=int, help="refuse longer summaries, their end counted")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows with an empty text or too long a summary"
    )
    parser.add_argument("--limit-pairs", type=int, help="take only so many pairs of each split")
    parser.add_argument(
        "--workers", type=int, default=1, help="encoding processes (default: 1); the result is the same"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other summaries at --output")
    return parser


def main(arguments: list[str]) -> None:
    """Make the stores."""
    options = make_parser().parse_args(arguments)
    refuse_output_inside(options.source, options.output)
    columns = Columns(options.document_column, options.summary_column)
    work = SummaryWork(
        open_pairs(options.source, columns, limit=options.limit_pairs),
        options.tokenizer,
        options.output,
        max_summary_tokens=options.max_summary_tokens,
        skip_bad_rows=options.skip_bad_rows,
        num_workers=options.workers,
        overwrite=options.overwrite,
    )
    with TokenizeProgress(work.source.name, 1) as progress:
        outcome = make_summaries(work, progress)
    print(describe(options.output, outcome))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
