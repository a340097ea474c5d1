"""Train a byte-level BPE tokenizer: python -m preprocess.train_tokenizer SOURCE --vocab-size 4096 --output DIR.

Notable: only training documents are read; the special tokens come first (0 end of text, 1 padding, 2 landmark).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

from preprocess.command import add_reading_options, reading_options, run_command
from preprocess.disk import full_disk_named
from preprocess.documents import TRAIN
from preprocess.folders import output_folder, refuse_output_inside
from preprocess.index import is_taken, move_into_place, refuse_foreign
from preprocess.sources import open_source
from preprocess.tokenizers import save_tokenizer, tokenizer_identity
from preprocess.train_bpe import train_bpe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EXAMPLES = """examples:
  python -m preprocess.train_tokenizer python_stdlib --vocab-size 4096 --output data/bpe4096
  python -m preprocess.train_tokenizer books/ --vocab-size 32000 --output data/bpe32k --limit-bytes 500000000
"""


def training_texts(source_name: str | Path, options: argparse.Namespace) -> Iterable[str]:
    """Yield the training documents of a source, up to ``options.limit_bytes``."""
    used = 0
    for document in open_source(source_name, reading_options(options)).documents():
        if options.limit_bytes is not None and used >= options.limit_bytes:
            return
        if document.split == TRAIN:
            used += document.num_bytes
            yield document.text


def main(arguments: list[str]) -> None:
    """Train and save a tokenizer."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.train_tokenizer",
        description="Train a byte-level BPE tokenizer on the training documents of a source.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder, file, hub:NAME[:config] or python_stdlib")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries of the vocabulary")
    parser.add_argument("--output", type=output_folder, required=True, help="tokenizer folder to make")
    parser.add_argument("--limit-bytes", type=int, help="stop reading after so many bytes of text")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output")
    add_reading_options(parser)
    options = parser.parse_args(arguments)
    if options.limit_bytes is not None and options.limit_bytes < 1:
        raise ValueError(f"limit_bytes must be at least 1, got {options.limit_bytes}")
    if is_taken(options.output):
        if not options.overwrite:
            raise FileExistsError(f"{options.output} exists: choose another --output or use --overwrite")
        refuse_foreign(options.output, TOKENIZER_FILES)
    refuse_output_inside(options.source, options.output)
    tokenizer = train_bpe(training_texts(options.source, options), vocab_size=options.vocab_size)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(f".{options.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with full_disk_named(options.output):
        save_tokenizer(tokenizer, partial)
    move_into_place(partial, options.output, overwrite=options.overwrite)
    print(f"{options.output}: {len(tokenizer)} entries, {tokenizer_identity(tokenizer)}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
