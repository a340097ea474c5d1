"""The work of cutting documents into a sequence store: done once, whole or not at all.

Notable: the same inputs and options find their store finished; a killed run is started again from its beginning.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.corpus_format import META_FILE, digest
from datamodules.sequence_store import SequenceStore
from preprocess.chunk_cut import Tail, chunk_document
from preprocess.chunk_inputs import DocumentInput, Vocabulary
from preprocess.chunk_store import SequenceWriter
from preprocess.disk import full_disk_named
from preprocess.index import is_taken, move_into_place
from preprocess.journal import WorkFolder

Report = Callable[[int, int, int], None]
"""Called with documents, tokens and inputs done so far."""


@dataclass(frozen=True)
class Cut:
    """How documents are cut; see ``preprocess.chunk_cut.chunk_document``."""

    length: int
    bos_token_id: int | None = None
    tail: Tail = "pad"
    parity: bool = False

    def __post_init__(self) -> None:
        chunk_document([], **asdict(self))


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        meta: ``meta.json`` of the store.
        was_there: the same store was there already.
    """

    meta: dict[str, Any]
    was_there: bool


def make_sequences(
    inputs: Sequence[DocumentInput],
    cut: Cut,
    *,
    output: Path,
    overwrite: bool = False,
    report: Report = lambda documents, tokens, done: None,
) -> Outcome:
    """Make a sequence store, or find it made.

    Args:
        inputs: their documents, in this order.
        cut: how each is cut.
        output: folder to make.
        overwrite: replace another store there, when this one is complete.
        report: hears about the progress.

    Raises:
        FileExistsError: something else is at ``output``.
        ValueError: the inputs do not belong together, hold no sequence, or an id is not in the vocabulary.
    """
    vocabulary = common_vocabulary(inputs, cut)
    source = {"inputs": len(inputs), "sha256": digest([documents.describe() for documents in inputs])}
    fields = {**asdict(cut), "tokenizer": vocabulary.identity, "source": source}
    finished = _finished(output, fields, overwrite=overwrite)
    if finished is not None:
        return Outcome(finished, was_there=True)
    folder = output.parent / f".{output.name}.{digest(fields)[:12]}.partial"
    try:
        with full_disk_named(output), WorkFolder(folder) as held:
            meta = _write(inputs, cut, folder=folder, fields=fields, report=report)
            held.clear_tools()
            move_into_place(folder, output, overwrite=overwrite)
    except ValueError:
        # Other documents or options are needed, and those are other work.
        shutil.rmtree(folder)
        raise
    return Outcome(meta, was_there=False)


def common_vocabulary(inputs: Sequence[DocumentInput], cut: Cut) -> Vocabulary:
    """Return the vocabulary that all inputs share.

    Raises:
        ValueError: they have different ones, or the beginning-of-text token is not in it.
    """
    first = inputs[0]
    for other in inputs[1:]:
        if other.vocabulary.identity != first.vocabulary.identity:
            raise ValueError(f"{first.name} and {other.name} have different tokenizers: make one store of each")
    if cut.bos_token_id is not None and cut.bos_token_id >= first.vocabulary.size:
        raise ValueError(f"bos_token_id {cut.bos_token_id} is not in the vocabulary of {first.vocabulary.size}")
    return first.vocabulary


def _finished(output: Path, fields: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Return ``meta.json`` of the store that is to be made, if it is there; refuse anything else that is."""
    if not is_taken(output):
        return None
    if not (output / META_FILE).is_file():
        raise FileExistsError(f"{output} exists and holds no sequences: choose another --output or remove it")
    meta = SequenceStore(output).meta
    if all(meta[name] == value for name, value in fields.items()):
        return meta
    if not overwrite:
        raise FileExistsError(
            f"{output} holds sequences of other documents or options: choose another --output or use --overwrite"
        )
    return None


def _write(
    inputs: Sequence[DocumentInput], cut: Cut, *, folder: Path, fields: dict[str, Any], report: Report
) -> dict[str, Any]:
    writer, documents, tokens = SequenceWriter(folder, cut.length), 0, 0
    try:
        for done, given in enumerate(inputs):
            for ids in given.documents():
                for chunk in chunk_document(ids, **asdict(cut)):
                    writer.add(documents, chunk)
                documents, tokens = documents + 1, tokens + len(ids)
                report(documents, tokens, done)
        if not writer.num_sequences:
            raise ValueError(
                f"{documents} documents of {tokens} tokens give no sequence of {cut.length}: check --input, and --tail"
            )
        return writer.finish(**fields, num_documents=documents)
    finally:
        writer.close()
