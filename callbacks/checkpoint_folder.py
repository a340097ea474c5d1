"""Checkpoints that are folders of shards: sealed when they are complete, verified before anything in them is read.

Notable: engines write their shards as pickles, some of which only the engine itself can read. A folder is handed to it
when its sizes and checksums are those of its seal and its pickles name nothing but what such files are made of.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from callbacks.pickle_names import imported_names
from callbacks.zero_checkpoint import TAG, model_states
from evaluation.results import read_json, write_json

# What a checkpoint can be, in words.
ONE_FILE, FSDP2, DEEPSPEED = "one file", "a folder of FSDP2", "a folder of DeepSpeed"
SEAL = "seal.json"
FSDP_META = "meta.pt"
UNLISTED = "what its archive does not list"
BLOCK = 1 << 22
# What pickles of checkpoints name: plain containers, tensors, and what the engines describe their shards with.
HARMLESS = re.compile(
    r"""collections\.(OrderedDict|defaultdict)
    | (builtins|__builtin__)\.(bool|bytearray|complex|dict|float|frozenset|int|list|set|slice|tuple)
    | datetime\.timedelta
    | pathlib\.(Posix|Windows)Path
    | torch\.(Size|Tensor|device|\w+Storage|bool|(b?float|u?int|complex|q?u?int)\d+\w*)
    | torch\._utils\._rebuild_(tensor_v2|tensor_v3|parameter|parameter_with_state)
    | torch\._tensor\._rebuild_from_type_v2
    | torch\.nn\.parameter\.Parameter
    | torch\.serialization\._get_layout
    | torch\.distributed\.checkpoint\.metadata\.\w+
    | torch\.distributed\.checkpoint\.filesystem\._StorageInfo
    | deepspeed\.runtime\.fp16\.loss_scaler\.(Dynamic)?LossScaler
    | deepspeed\.runtime\.zero\.config\.ZeroStageEnum
    | deepspeed\.utils\.tensor_fragment\.fragment_address""",
    re.VERBOSE,
)


def seal(folder: Path) -> None:
    """Write sizes and checksums of all files of a folder into it, flushed to the disk: from now on it is complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(_fingerprint, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    write_json(folder / SEAL, {"files": dict(zip(names, found, strict=True))})


def verify(folder: Path) -> None:
    """Compare a folder with its seal, and look at what its pickles name.

    Raises:
        ValueError: it is incomplete, damaged, or holds what no checkpoint holds.
    """
    if not (folder / SEAL).is_file():
        raise ValueError(f"checkpoint {folder} has no {SEAL}: it is incomplete, or none of a training run")
    sealed = read_json(folder / SEAL).get("files", {})
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(lambda name: _fingerprint(folder / name), sealed))
    for (name, expected), actual in zip(sealed.items(), found, strict=True):
        if actual != expected:
            raise ValueError(
                f"checkpoint {folder} is damaged ({name}): name another, or delete it to resume from the one before it"
            )
    # Engines read files by their names, sealed or not, and DeepSpeed those of the folder that a file names.
    for path in sorted({folder / name for name in sealed} | {*folder.glob("*"), *folder.glob("*/*")}):
        named = next((name for name in _globals(path) if not HARMLESS.fullmatch(name)), None)
        if named is not None:
            raise ValueError(f"{path} names {named}, which no checkpoint needs: it is not read")
    latest = folder / "latest"
    if latest.is_file() and latest.read_bytes().strip() != TAG.encode():
        raise ValueError(f"{latest} names another folder than {TAG}: it is not read")


def refuse_other_layout(path: Path, readable: Collection[str]) -> None:
    """Raise ValueError unless a checkpoint is of one of the readable layouts."""
    found = ONE_FILE if path.is_file() else FSDP2 if (path / FSDP_META).is_file() else DEEPSPEED
    if found not in readable:
        raise ValueError(
            f"checkpoint {path} is {found}, and this trainer reads {' or '.join(readable)}: resume with the trainer "
            f"that it was written with, or begin another run with its weights: python export.py checkpoint={path}, "
            "then model.path=FOLDER"
        )


def metadata_of(path: Path) -> dict[str, Any]:
    """What a checkpoint stores beside weights and moments: step, model configuration, states of loops."""
    if path.is_file() or (path / FSDP_META).is_file():
        file = path if path.is_file() else path / FSDP_META
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return model_states(path)[0]


def gathered_shards(folder: Path) -> dict[str, Any]:
    """``{"state_dict": {name: tensor}}`` of a checkpoint of FSDP2, in this process alone."""
    from torch.distributed.checkpoint import FileSystemReader  # slow to import
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})
    _load_state_dict(found, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    return found


def sliced_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the weights in a checkpoint of FSDP2."""
    from torch.distributed.checkpoint import FileSystemReader  # slow to import

    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    prefix = "state_dict."
    return {name.removeprefix(prefix): d.size for name, d in described.items() if name.startswith(prefix)}  # type: ignore[union-attr]


def _fingerprint(path: Path) -> dict[str, int] | None:
    """Size and CRC-32 of a file, None where there is none."""
    if not path.is_file():
        return None
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def _globals(path: Path) -> Iterator[str]:
    """Names that the pickles in a file refer to.

    `UNLISTED` for a file of tensors that is no archive by itself: read as a pickle from its first byte on, or by a
    reader that looks for the records elsewhere, it could hold others than those that are found here.
    """
    if not path.is_file():
        return
    if path.name == ".metadata":
        with path.open("rb") as file:
            yield from imported_names(file)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if path.suffix == ".pt" and not (_begins_as_archive(path) and any(r.header_offset == 0 for r in records)):
                yield UNLISTED
            for record in records:  # of two with one name both
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as file:
                        yield from imported_names(file)
    elif path.suffix == ".pt":
        yield UNLISTED


def _begins_as_archive(path: Path) -> bool:
    """What torch goes by; an archive for Python may begin with anything."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
