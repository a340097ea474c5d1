"""PG19, books published before 1919: python -m preprocess.pg19 --output data/pg19 [--source FOLDER].

Notable: the parquet layout of the hub (short_book_title, publication_date, url, text), each book one document.
"""

from __future__ import annotations

import argparse

from preprocess.command import add_reading_options, reading_options, run_command
from preprocess.sources import open_source
from preprocess.tokenize import add_work_options, run_work

HUB_NAME = "hub:emozilla/pg19"
TOKENIZER = "gpt2"


def main(arguments: list[str]) -> None:
    """Tokenise PG19 from the hub or from a local copy."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.pg19",
        description="Tokenise PG19 (28,602 training, 50 validation and 100 test books).",
        epilog="example: python -m preprocess.pg19 --output data/pg19 --workers 16",
    )
    parser.add_argument("--source", default=HUB_NAME, help=f"folder with the parquet files (default: {HUB_NAME})")
    add_work_options(parser, tokenizer=TOKENIZER)
    add_reading_options(parser)
    options = parser.parse_args(arguments)
    source = open_source(options.source, reading_options(options), limit_documents=options.limit_documents)
    run_work(source, options)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
