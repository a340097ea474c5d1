"""Folders of shards: sealed or refused; nothing but tensors and plain values is read; ZeRO's pieces, put together."""

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict

import pytest
import torch

from callbacks import sharded_strategies
from callbacks.checkpoint import newest_checkpoint, read_checkpoint
from callbacks.checkpoint_folder import SEAL, UNLISTED, seal, verify
from callbacks.pickle_names import UNREADABLE, imported_names
from callbacks.sharded_strategies import finish
from callbacks.zero_checkpoint import zero_state_dict
from evaluation.results import read_json, write_json

WORLD = 2
SHAPES = {"model.a": (3, 3), "model.b": (5,), "model.c": (2, 2)}
META = {"global_step": 4, "model_config": "{}"}


def weights():
    draw = torch.Generator().manual_seed(0)
    return OrderedDict((name, torch.randn(shape, generator=draw)) for name, shape in SHAPES.items())


def common(module):
    return {
        "module": module,
        "buffer_names": ["model.buffer"],
        "param_shapes": [OrderedDict((n, torch.Size(SHAPES[n])) for n in ("model.a", "model.b"))],
        "frozen_param_shapes": OrderedDict({"model.c": torch.Size(SHAPES["model.c"])}),
        "shared_params": {"model.head": "model.a"},
        **META,
    }


def write_zero_2(folder):
    """One group, cut in two pieces with a filled end; the first process writes all frozen weights."""
    state = weights()
    flat = torch.cat([state["model.a"].flatten(), state["model.b"], torch.zeros(2)])
    places = folder / "checkpoint"
    places.mkdir(parents=True)
    module = state | {"model.buffer": torch.arange(3)}
    fragments = {"frozen_param_fragments": {"model.c": state["model.c"]}}
    torch.save(common(module) | fragments, places / "mp_rank_00_model_states.pt")
    for rank, piece in enumerate(flat.chunk(WORLD)):
        moments = {"single_partition_of_fp32_groups": [piece.clone()], "partition_count": [WORLD]}
        torch.save({"optimizer_state_dict": moments}, places / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return state


def write_zero_3(folder):
    """Every parameter cut in two pieces of equal size."""
    state = weights()
    places = folder / "checkpoint"
    places.mkdir(parents=True)

    def piece(tensor, rank):
        size = -(-tensor.numel() // WORLD)
        return torch.cat([tensor.flatten(), torch.zeros(size * WORLD - tensor.numel())])[rank * size :][:size].clone()

    for rank in range(WORLD):
        flat = torch.cat([piece(state[name], rank) for name in ("model.a", "model.b")])
        fragments = {"frozen_param_fragments": {"model.c": piece(state["model.c"], rank)}}
        named = places / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save(common({"model.buffer": torch.arange(3)}) | fragments, named)
        moments = {"fp32_flat_groups": [flat[:3], flat[3:]], "partition_count": WORLD}
        torch.save({"optimizer_state_dict": moments}, places / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return state


@pytest.mark.parametrize("write", [write_zero_2, write_zero_3])
def test_zero_pieces_are_put_together(tmp_path, write):
    folder = tmp_path / "step_4.ckpt"
    state = write(folder)
    seal(folder)
    assert newest_checkpoint(tmp_path) == folder
    found = read_checkpoint(folder)
    assert found["global_step"] == 4
    expected = state | {"model.head": state["model.a"], "model.buffer": torch.arange(3)}
    assert found["state_dict"].keys() == expected.keys()
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in expected.items())
    (folder / "checkpoint" / next(p.name for p in (folder / "checkpoint").glob("*rank_1*optim*"))).unlink()
    with pytest.raises(ValueError, match="holds the moments of 1 of"):
        zero_state_dict(folder)


@pytest.mark.parametrize("write", [write_zero_2, write_zero_3])
def test_zero_pieces_without_frozen_weights(tmp_path, write):
    """As of a model with adapters: of what is frozen and shared there is no name at all."""
    state = write(tmp_path)
    for path in (tmp_path / "checkpoint").glob("*model_states.pt"):
        stored = torch.load(path, weights_only=False)
        stored |= {"frozen_param_shapes": None, "frozen_param_fragments": None}
        stored["shared_params"] = {"model.head": "model.c", "model.other": "model.b"}
        torch.save(stored, path)
    found = zero_state_dict(tmp_path)
    assert found.keys() == {"model.a", "model.b", "model.other", "model.buffer"}
    assert torch.equal(found["model.other"], state["model.b"])


def test_unsealed_incomplete_and_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "step_4.ckpt"
    write_zero_2(folder)
    with pytest.raises(ValueError, match=r"no seal\.json: it is incomplete"):
        verify(folder)
    seal(folder)
    verify(folder)
    for path in sorted((folder / "checkpoint").iterdir()):
        whole = path.read_bytes()
        for damaged in (
            whole[:-1],
            whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1 :],
        ):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"is damaged .checkpoint/{path.name}"):
                read_checkpoint(folder)
        path.unlink()
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(folder, weights=False)
        path.write_bytes(whole)
    verify(folder)


class Evil:
    def __reduce__(self):
        return os.system, ("echo",)


def test_a_pickle_that_would_run_something_is_never_read(tmp_path):
    folder = tmp_path / "step_4.ckpt"
    write_zero_2(folder)
    torch.save({"optimizer_state_dict": Evil()}, folder / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    seal(folder)
    with pytest.raises(ValueError, match=r"names (posix|nt|os)\.system, which no checkpoint needs"):
        read_checkpoint(folder)


def saved(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def twice_named():
    """An archive with two records of one name; torch reads the first, Python by name the last."""
    stream, whole = io.BytesIO(), zipfile.ZipFile(io.BytesIO(saved(Evil())))
    with zipfile.ZipFile(stream, "w") as archive:
        for record in whole.infolist():
            archive.writestr(record.filename, whole.read(record))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(next(n for n in whole.namelist() if n.endswith("data.pkl")), pickle.dumps({}))
    return stream.getvalue()


HIDDEN = {
    "old format": (lambda: saved(Evil(), _use_new_zipfile_serialization=False), UNLISTED),
    "old format, an archive behind it": (
        lambda: saved(Evil(), _use_new_zipfile_serialization=False) + saved({}),
        UNLISTED,
    ),
    "an archive behind an archive": (lambda: saved(Evil()) + saved({}), UNLISTED),
    "two records of one name": (twice_named, r"(posix|nt|os)\.system"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_pickle_is_not_hidden_from_the_look_at_its_names(tmp_path, name):
    make, named = HIDDEN[name]
    write_zero_2(tmp_path)
    (tmp_path / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(make())
    seal(tmp_path)
    with pytest.raises(ValueError, match=rf"optim_states\.pt names {named}, which no checkpoint needs"):
        verify(tmp_path)


def test_a_file_that_the_seal_leaves_out_is_looked_at_too(tmp_path):
    write_zero_2(tmp_path)
    name = "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    seal(tmp_path)
    files = read_json(tmp_path / SEAL)["files"]
    write_json(tmp_path / SEAL, {"files": {other: found for other, found in files.items() if other != name}})
    verify(tmp_path)
    torch.save(Evil(), tmp_path / name)
    with pytest.raises(ValueError, match=r"system, which no checkpoint needs"):
        verify(tmp_path)


def test_metadata_with_an_archive_behind_it_is_looked_at(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()) + saved({}))
    seal(tmp_path)
    with pytest.raises(ValueError, match=r"system, which no checkpoint needs"):
        verify(tmp_path)


def test_an_engine_is_not_sent_to_another_folder(tmp_path):
    write_zero_2(tmp_path)
    (tmp_path / "latest").write_text("checkpoint")
    seal(tmp_path)
    verify(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    seal(tmp_path)
    with pytest.raises(ValueError, match="latest names another folder than checkpoint: it is not read"):
        verify(tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_names_are_found_without_running_a_pickle(protocol):
    values = [OrderedDict(a=1), torch.Size([2]), Evil(), OrderedDict(b=2)]
    stream = io.BytesIO(pickle.dumps(values, protocol=protocol))
    found = set(imported_names(stream))
    assert {"collections.OrderedDict", "torch.Size"} <= found and {"posix.system", "nt.system"} & found


def test_a_hidden_name_is_not_taken_for_another():
    # Two harmless strings are pushed after the real ones, and taken off again.
    ops = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}

    def string(text):
        return ops["SHORT_BINUNICODE"] + bytes([len(text)]) + text.encode()

    hidden = string("os") + string("system") + string("torch") + string("Size") + ops["POP"] * 2 + ops["STACK_GLOBAL"]
    assert list(imported_names(io.BytesIO(hidden + b"."))) == [UNREADABLE]


def folder_of(path, text):
    path.mkdir()
    (path / "shard.bin").write_text(text)
    return path


def test_a_finished_folder_takes_the_place_of_an_older_one(tmp_path):
    target = folder_of(tmp_path / "step_1.ckpt", "old")
    assert finish(folder_of(tmp_path / "step_1.ckpt.part", "new"), target) is None
    assert (target / "shard.bin").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == [target.name]


def test_what_cannot_be_sealed_is_removed_and_the_older_one_stays(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_strategies, "seal", full)
    target = folder_of(tmp_path / "step_1.ckpt", "old")
    problem = finish(folder_of(tmp_path / "step_1.ckpt.part", "new"), target)
    assert "step_1.ckpt" in problem and "No space left" in problem and "free space and resume" in problem
    assert (target / "shard.bin").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == [target.name]
