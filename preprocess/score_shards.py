"""Write shards of scores so that a process killed at any moment leaves nothing that is taken for scores.

Notable: a file gets its name only when its content is on the disk, and the commit record comes last.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.corpus_format import canonical_json, identity_of
from datamodules.score_store import MANIFEST_FILE, SCORE_DTYPE, Shard, read_manifest

TEMPORARY_SUFFIX = ".partial"


def claim_folder(folder: Path, manifest: dict[str, Any]) -> str:
    """Write the manifest of a folder, or check that it is this one; return its SHA-256.

    Raises:
        FileExistsError: the folder holds something else than scores.
        ValueError: the folder has another manifest; every key that differs is named with both values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = canonical_json(manifest).encode()
    if not (folder / MANIFEST_FILE).exists():
        foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith((".", "shard-")))
        if foreign and MANIFEST_FILE not in foreign:  # which another rank may have put there just now
            raise FileExistsError(f"{folder} holds {', '.join(foreign[:3])} and no scores: choose another --output")
        temporary = _write_temporary(folder / MANIFEST_FILE, content)
        try:
            # Unlike a rename, a link never replaces what another rank has just put there.
            os.link(temporary, folder / MANIFEST_FILE)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        _sync_folder(folder)
    found, manifest_id = read_manifest(folder)
    if different := differences(found, manifest):
        raise ValueError(
            f"{folder} holds other scores: {'; '.join(different)}; choose another --output or the options it was "
            "made with"
        )
    return manifest_id


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """List what differs between two manifests, as ``dotted.name is X there and Y here``."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        lines = [differences(there.get(key), here.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [line for found in lines for line in found]
    return [] if there == here else [f"{name} is {canonical_json(there)} there and {canonical_json(here)} here"]


def write_shard(
    folder: Path, shard: Shard, scores: npt.NDArray[np.float32], *, manifest_id: str, about: dict[str, Any]
) -> None:
    """Put a shard and its commit record into place, durably and in this order.

    Args:
        folder: score folder.
        shard: which one.
        scores: float32 [rows, T].
        manifest_id: of the folder.
        about: further entries of the record, for information.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(scores, SCORE_DTYPE))
    content = buffer.getvalue()
    record: dict[str, Any] = {"shard": shard.number, "first": shard.first, "rows": shard.rows, "bytes": len(content)}
    record |= {"sha256": hashlib.sha256(content).hexdigest(), "manifest_id": manifest_id, **about}
    record["identity"] = identity_of(record)
    for name, data in ((shard.array_name, content), (shard.record_name, canonical_json(record).encode())):
        _write_temporary(folder / name, data).replace(folder / name)
        _sync_folder(folder)
        # What killed writers of the same file have left behind.
        for leftover in folder.glob(f".{name}.*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)


def _write_temporary(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk gets back what was taken
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
