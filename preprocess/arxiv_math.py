"""ArXiv-math, the arXiv part of proof-pile: python -m preprocess.arxiv_math --output data/arxiv [--source FOLDER].

Notable: proof-pile mixes sources; a document counts if ``meta.config`` is ``arxiv``. Its files are json lines whose
``meta`` differs from source to source, so they are streamed as lines.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from preprocess.command import add_reading_options, reading_options, run_command
from preprocess.documents import TEST, TRAIN, VALIDATION, LimitedSource, Source
from preprocess.hub import HubSource
from preprocess.sources import open_source
from preprocess.tokenize import add_work_options, run_work

HUB_NAME = "hoskinson-center/proof-pile"
HUB_FILES = {TRAIN: "train/*.jsonl.gz", VALIDATION: "dev/*.jsonl.gz", TEST: "test/*.jsonl.gz"}
ARXIV = "meta.config=arxiv"
TOKENIZER = "gpt2"


def open_arxiv(options: argparse.Namespace) -> Source:
    """Open proof-pile, keeping its arXiv documents."""
    reading = reading_options(options)
    reading = replace(reading, where=reading.where or ARXIV)
    if options.source is not None:
        return open_source(options.source, reading, limit_documents=options.limit_documents)
    source = HubSource(HUB_NAME, reading, json_lines=HUB_FILES)
    return source if options.limit_documents is None else LimitedSource(source, options.limit_documents)


def main(arguments: list[str]) -> None:
    """Tokenise the arXiv part of proof-pile from the hub or from a local copy."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.arxiv_math",
        description="Tokenise the arXiv documents of proof-pile.",
        epilog="example: python -m preprocess.arxiv_math --output data/arxiv_math --workers 16",
    )
    parser.add_argument("--source", help=f"folder with the .jsonl.gz files (default: the hub, {HUB_NAME})")
    add_work_options(parser, tokenizer=TOKENIZER)
    add_reading_options(parser)
    options = parser.parse_args(arguments)
    run_work(open_arxiv(options), options)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
