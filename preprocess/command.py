"""What the preprocessing commands share: their common options and how they end on an error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from preprocess.documents import DEFAULT_VALIDATION_FRACTION, SPLITS, TEXT_COLUMN, ReadOptions

USER_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


def run_command(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> int:
    """Run a command; a user's error is one sentence on the error stream and status 2, an interruption 130."""
    print_anything()
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except USER_ERRORS as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def print_anything() -> None:
    """Let the standard output show what its encoding lacks as escapes: no result is lost for a letter."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def sentence(error: BaseException) -> str:
    """Return the message of an error on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how raw text is read."""
    group = parser.add_argument_group("reading")
    group.add_argument("--text-column", default=TEXT_COLUMN, help=f"column or key of the text (default: {TEXT_COLUMN})")
    group.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8: stop and say where (strict), or put U+FFFD (replace)",
    )
    group.add_argument("--where", metavar="KEY=VALUE", help="keep rows with this value, as in meta.config=arxiv")
    group.add_argument("--join-rows", action="store_true", help="all rows of a file are one document")
    group.add_argument("--suffix", nargs="+", default=(), metavar="SUFFIX", help="files of a folder to read")
    group.add_argument("--split", nargs="+", choices=SPLITS, default=(), help="splits to keep (default: all)")
    group.add_argument(
        "--validation-fraction",
        type=float,
        default=DEFAULT_VALIDATION_FRACTION,
        help="share of the training documents held out, by hash, where the source has no validation split "
        f"(default: {DEFAULT_VALIDATION_FRACTION})",
    )


def reading_options(options: argparse.Namespace) -> ReadOptions:
    """Collect what ``add_reading_options`` added."""
    return ReadOptions(
        text_column=options.text_column,
        errors=options.errors,
        validation_fraction=options.validation_fraction,
        where=options.where,
        join_rows=options.join_rows,
        suffixes=tuple(options.suffix),
        splits=tuple(options.split),
    )
