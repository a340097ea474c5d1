"""Cut documents into sequences: python -m preprocess.chunk_documents --input FILE --output DIR --length C."""

from __future__ import annotations

import argparse
from pathlib import Path

from preprocess.chunk_cut import TAILS, Chunk, chunk_document
from preprocess.chunk_inputs import Vocabulary, open_input
from preprocess.chunk_job import Cut, Outcome, make_sequences
from preprocess.command import add_reading_options, reading_options, run_command
from preprocess.folders import output_folder, refuse_output_inside
from preprocess.progress import TokenizeProgress
from preprocess.tokenizers import canonical_backend, load_tokenizer, tokenizer_identity

__all__ = ["Chunk", "chunk_document"]

EXAMPLES = """examples:
  python -m preprocess.chunk_documents --input data/books/train --output data/books-32k --length 32768
  python -m preprocess.chunk_documents --input books.parquet --tokenizer models/llama --bos-token-id 128000 \\
      --output data/books-32k --length 32768 --workers 8
  python -m preprocess.chunk_documents --input texts/ --split train --tokenizer gpt2 --output data/texts --length 8192
  python -m preprocess.chunk_documents --input ids.jsonl --output data/ids --length 4096 --tail align

An input is a split of a corpus that preprocess.tokenize made, a file of json lines or parquet with a column of ids
(tokens), or text: anything that preprocess.tokenize reads. Every sequence comes from one document, and every token of
a document is a target once. Text of many gigabytes is better tokenised first: that goes on after a kill.
"""


def vocabulary_of(tokenizer: str | None) -> Vocabulary | None:
    """Load the tokenizer that the user named, None if none was."""
    if tokenizer is None:
        return None
    loaded = load_tokenizer(tokenizer)
    return Vocabulary(len(loaded), tokenizer_identity(loaded), canonical_backend(loaded))


def summary(output: Path, outcome: Outcome) -> str:
    """Say in two lines what the store holds."""
    meta = outcome.meta
    sizes = f"{meta['num_sequences']:,} sequences of {meta['length']:,} tokens from {meta['num_documents']:,} documents"
    state = "already there, nothing to do" if outcome.was_there else "done"
    return f"{output}: {state}\n  {sizes}, {meta['num_targets']:,} targets, store_id {meta['store_id'][:12]}"


def make_parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.chunk_documents",
        description="Cut documents into sequences of one length, each of one document.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="text, rows of ids, or a corpus split"
    )
    parser.add_argument("--output", type=output_folder, required=True, help="folder to make")
    parser.add_argument("--length", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--tokenizer", help="for text: bytes, a folder, a tokenizer.json or a hub name")
    parser.add_argument("--bos-token-id", type=int, help="put this token in front of every sequence (default: none)")
    parser.add_argument(
        "--tail",
        choices=TAILS,
        default="pad",
        help="the rest of a document: a shorter sequence (pad), its last full stretch (align), or nothing (drop)",
    )
    parser.add_argument("--parity", action="store_true", help="cut as the published code does (needs --tail drop)")
    parser.add_argument("--workers", type=int, default=1, help="encoding processes for text (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace other sequences at --output")
    add_reading_options(parser)
    return parser


def main(arguments: list[str]) -> None:
    """Make a sequence store."""
    options = make_parser().parse_args(arguments)
    if options.workers < 1:
        raise ValueError(f"workers must be at least 1, got {options.workers}")
    cut = Cut(options.length, options.bos_token_id, tail=options.tail, parity=options.parity)
    vocabulary, reading = vocabulary_of(options.tokenizer), reading_options(options)
    for name in options.input:
        refuse_output_inside(name, options.output)
    inputs = [open_input(name, vocabulary, options=reading, num_workers=options.workers) for name in options.input]
    with TokenizeProgress(options.output.name, len(inputs)) as progress:
        outcome = make_sequences(inputs, cut, output=options.output, overwrite=options.overwrite, report=progress)
    print(summary(options.output, outcome))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
