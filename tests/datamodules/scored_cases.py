"""Small stores of sequences and scores, written without a model."""

from pathlib import Path

import numpy as np

from datamodules.score_store import FORMAT, VERSION, ScoreStore, shards_of
from datamodules.sequence_store import SequenceStore
from preprocess.chunk_cut import chunk_document
from preprocess.chunk_store import SequenceWriter
from preprocess.score_shards import claim_folder, write_shard

LENGTH = 10


def write_sequences(
    folder: Path, *, sizes=(25, 4, 10, 61), length=LENGTH, tail="align", bos_token_id=None, tokenizer=None
) -> SequenceStore:
    folder.mkdir(parents=True)
    writer, draw = SequenceWriter(folder, length), np.random.default_rng(3)
    for document, size in enumerate(sizes):
        ids = draw.integers(1, 500, size=size)
        for chunk in chunk_document(ids, length, tail=tail, bos_token_id=bos_token_id):
            writer.add(document, chunk)
    writer.finish(bos_token_id=bos_token_id, tail=tail, parity=False, tokenizer=tokenizer, source="test")
    return SequenceStore(folder)


def write_scores(folder: Path, sequences: SequenceStore, *, shard_size=5, limit=None, **manifest) -> Path:
    """Random scores at the valid targets from the third on, NaN elsewhere."""
    content = {"format": FORMAT, "version": VERSION, "sequences": sequences.store_id, "shard_size": shard_size}
    manifest_id = claim_folder(folder, content | manifest)
    draw = np.random.default_rng(8)
    for shard in shards_of(len(sequences), shard_size)[:limit]:
        scores = draw.gamma(2.0, size=(shard.rows, sequences.length - 1)).astype(np.float32)
        valid = np.stack([sequences.valid(shard.first + row).numpy() for row in range(shard.rows)])
        scores[~valid | (np.arange(sequences.length - 1) < 2)] = np.nan
        write_shard(folder, shard, scores, manifest_id=manifest_id, about={"host": "test"})
    return folder


def write_both(folder: Path, **options) -> tuple[SequenceStore, ScoreStore]:
    sequences = write_sequences(folder / "sequences", **options)
    return sequences, ScoreStore(write_scores(folder / "scores", sequences), sequences)
