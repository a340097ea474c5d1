"""Scores of a sequence store by a fixed model, in shards: the format, and the reader that joins them by number.

A score folder holds:

* ``manifest.json``: canonical JSON of everything that decides the scores; ``manifest_id`` is the SHA-256 of the file;
* ``shard-000000.npy``: float32 [rows, T], the loss of every target in its short context, NaN where there is none;
* ``shard-000000.json``: the record that makes the shard count: {shard, first, rows, bytes, sha256, manifest_id}, for
  information, where and how fast it was made, and ``identity``, the SHA-256 of everything else in it.

Notable: a shard without a valid record does not exist, so neither a killed writer nor several of them can leave
something behind that is taken for scores. A process hashes a shard before it reads the first score of it.

Letters: T targets of a sequence.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

from datamodules.corpus_format import canonical_json, file_sha256, identity_of
from datamodules.sequence_store import SequenceStore, open_sequences

FORMAT = "base-scores"
VERSION = 1
MANIFEST_FILE = "manifest.json"
SCORE_DTYPE = np.dtype("<f4")
# A record without an identity, as other writers may leave it, has no entries but these.
RECORD_FIELDS = {"shard", "first", "rows", "bytes", "sha256", "manifest_id", "host", "seconds"}

Verify = Literal["sizes", "full"]
ShardState = Literal["intact", "missing", "torn", "corrupt"]


class Shard(NamedTuple):
    """Consecutive sequences whose scores share a file."""

    number: int
    first: int
    rows: int

    @property
    def array_name(self) -> str:
        """Name of the file of scores."""
        return f"shard-{self.number:06d}.npy"

    @property
    def record_name(self) -> str:
        """Name of the commit record."""
        return f"shard-{self.number:06d}.json"


class ScoreStore:
    """Scores written by ``python -m preprocess.score_tokens``; ``store[i]`` is the float32 row [T] of sequence i.

    Args:
        path: score folder.
        sequences: the sequence store that was scored, or its path.
        verify: ``"sizes"`` compares file sizes with the records now and the SHA-256 of a shard when it is first read,
            ``"full"`` all of them now.

    Raises:
        FileNotFoundError: no scores there.
        ValueError: the scores are of other sequences, or a shard is missing, torn or corrupt (all are listed).
    """

    def __init__(self, path: str | Path, sequences: SequenceStore | str | Path, verify: Verify = "sizes"):
        if verify not in get_args(Verify):
            raise ValueError(f"verify is one of {', '.join(get_args(Verify))}, got {verify}")
        self.path = Path(path)
        self.manifest, self.manifest_id = read_manifest(self.path)
        sequences = open_sequences(sequences)
        check_sequences(self.path, self.manifest, sequences.store_id)
        self.num_targets = sequences.length - 1
        self.shard_size = int(self.manifest["shard_size"])
        self._shards = shards_of(len(sequences), self.shard_size)
        self._maps: dict[int, npt.NDArray[np.float32]] = {}
        states = shard_states(self.path, self._shards, self.manifest_id, full=verify == "full")
        if problems := describe_problems(states):
            files = ", ".join(suspects(self.path, self._shards, states, self.manifest_id)[:3])
            raise ValueError(
                f"{self.path} cannot be used: {problems}; run python -m preprocess.score_tokens again"
                f"{f' (look at {files})' if files else ''}"
            )
        self._whole = set(states) if verify == "full" else set[int]()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind."""
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return sum(shard.rows for shard in self._shards)

    def __getitem__(self, number: int) -> torch.Tensor:
        if not 0 <= number < len(self):
            raise IndexError(f"scores of sequence {number} of {len(self)}")
        shard, row = divmod(number, self.shard_size)
        # The copy is the caller's; the map is read-only.
        return torch.from_numpy(np.array(self._map(shard)[row], np.float32))

    def _map(self, number: int) -> npt.NDArray[np.float32]:
        if number not in self._maps:
            shard = self._shards[number]
            array = np.load(self.path / shard.array_name, mmap_mode="r")
            if array.shape != (shard.rows, self.num_targets) or array.dtype != SCORE_DTYPE:
                raise ValueError(
                    f"shard {number} of {self.path} is {array.dtype} {array.shape}, not float32 "
                    f"{(shard.rows, self.num_targets)}: run python -m preprocess.score_tokens --verify"
                )
            if number not in self._whole and shard_state(self.path, shard, self.manifest_id, full=True) != "intact":
                raise ValueError(
                    f"{self.path / shard.array_name} is damaged: its checksum is not that of its record; "
                    "run python -m preprocess.score_tokens again"
                )
            self._whole.add(number)
            self._maps[number] = array
        return self._maps[number]


def shards_of(num_sequences: int, shard_size: int) -> list[Shard]:
    """Cut sequences into shards: shard k holds ``[shard_size k, shard_size (k + 1))``, whoever makes it."""
    return [
        Shard(number, first, min(shard_size, num_sequences - first))
        for number, first in enumerate(range(0, num_sequences, shard_size))
    ]


def shard_state(folder: Path, shard: Shard, manifest_id: str, *, full: bool) -> ShardState:
    """Say how a shard is: missing without a valid record, torn if its size differs, corrupt if its hash does.

    Args:
        folder: score folder.
        shard: which one.
        manifest_id: of the folder; a record of another manifest does not count.
        full: compare the hash, too.
    """
    record, array = read_record(folder / shard.record_name), folder / shard.array_name
    expected = {**shard._asdict(), "manifest_id": manifest_id}
    expected["shard"] = expected.pop("number")
    if any(record.get(name) != value for name, value in expected.items()) or not array.is_file():
        return "missing"
    if array.stat().st_size != record.get("bytes"):
        return "torn"
    return "corrupt" if full and file_sha256(array) != record.get("sha256") else "intact"


def shard_states(folder: Path, shards: list[Shard], manifest_id: str, *, full: bool) -> dict[int, ShardState]:
    """Return the state of every shard by its number; arguments as ``shard_state``."""
    return {shard.number: shard_state(folder, shard, manifest_id, full=full) for shard in shards}


def describe_problems(states: dict[int, ShardState]) -> str:
    """List the shards that are not intact, by state; an empty text if there is none."""
    parts = []
    for state in ("missing", "torn", "corrupt"):
        numbers = [str(number) for number, found in states.items() if found == state]
        if numbers:
            parts.append(f"{state} shards {', '.join(numbers)} of {len(states)}")
    return "; ".join(parts)


def suspects(folder: Path, shards: list[Shard], states: dict[int, ShardState], manifest_id: str) -> list[str]:
    """Name the files that make shards count for less than intact; files that were never written are none."""
    ids = {read_record(folder / shard.record_name).get("manifest_id", manifest_id) for shard in shards}
    if len(ids) == 1 and ids != {manifest_id}:
        return [MANIFEST_FILE]  # every record names the one that was there
    names = []
    for shard in shards:
        state = states[shard.number]
        name = shard.array_name if state in ("torn", "corrupt") else shard.record_name
        if state != "intact" and (folder / name).exists():
            names.append(name)
    return names


def read_manifest(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return ``manifest.json`` of a score folder and its SHA-256.

    Raises:
        FileNotFoundError: there are no scores at ``path``.
        ValueError: the file is not a manifest of this version in canonical form.
    """
    file = Path(path) / MANIFEST_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no scores at {path}: make them with python -m preprocess.score_tokens")
    content = file.read_bytes()
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): make the scores again") from error
    if not isinstance(manifest, dict) or canonical_json(manifest).encode() != content:
        raise ValueError(f"{file} was changed after it was written: make the scores again")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"{file} does not describe {FORMAT} of version {VERSION}: make the scores again")
    return manifest, hashlib.sha256(content).hexdigest()


def check_sequences(path: Path, manifest: dict[str, Any], store_id: str) -> None:
    """Raise ValueError if a manifest is of other sequences than those of ``store_id``, or of no sequences at all."""
    size = manifest.get("shard_size")
    if not isinstance(size, int) or size < 1 or not isinstance(manifest.get("sequences"), str):
        raise ValueError(f"{path / MANIFEST_FILE} lacks a valid shard_size or sequences: make the scores again")
    if manifest["sequences"] != store_id:
        raise ValueError(
            f"{path / MANIFEST_FILE} scores the sequences {manifest['sequences']}, but these are {store_id}: "
            "use the store that was scored, or score this one"
        )


def read_record(file: Path) -> dict[str, Any]:
    """Return a commit record; an empty one if there is none, or it is torn or changed."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict):
        return {}
    whole = record["identity"] == identity_of(record) if "identity" in record else record.keys() <= RECORD_FIELDS
    return record if whole else {}
