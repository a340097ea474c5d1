"""The choice of tile sizes: candidates, measuring with a stub timer, and the file that remembers."""

import json
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from kernels.gca.autotune import Tuner, choose, tuning_key
from kernels.gca.launch import Launch, Shape, candidates

SHAPE = Shape("forward", 64, 63, 64, torch.bfloat16, descriptors=True)
OPTIONS = candidates(SHAPE, 9)


class Runs:
    """Launches that take the time given, and a timer that reads it."""

    def __init__(self, times):
        self.times = times
        self.launched = []

    def run(self, launch):
        self.launched.append(launch)
        if self.times[launch] is None:
            raise RuntimeError("out of resources: shared memory")

    def timer(self, call):
        call()
        return self.times[self.launched[-1]]


def fastest(number):
    return Runs({option: 1.0 if place == number else 2.0 for place, option in enumerate(OPTIONS)})


@pytest.mark.parametrize("kind", ["forward", "query", "key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_candidates_are_few_and_distinct_and_the_default_comes_first(kind, dtype):
    sizes = product(((1, 1), (12, 64), (64, 63), (65, 65), (256, 128), (64, 500)), (1, 16, 24, 64, 96, 128, 200, 256))
    for (rows, keys), size in sizes:
        shape = Shape(kind, rows, keys, size, dtype, descriptors=dtype.itemsize == 2)
        options = candidates(shape, 9)
        assert 1 <= len(options) <= 12 and len(set(options)) == len(options)
        assert candidates(shape, 8) == [option for option in options if not option.descriptors]
        assert candidates(replace(shape, descriptors=False), 9) == candidates(shape, 8)
        for option in options:
            assert option.block_d >= size and option.block_m >= 16 and option.block_c >= 16
            assert option.block_m < 2 * max(rows, 16)  # no tile is more than half empty


def test_descriptors_are_offered_to_hopper_alone():
    assert not OPTIONS[0].descriptors and sum(option.descriptors for option in OPTIONS) >= 1
    assert not any(option.descriptors for option in candidates(replace(SHAPE, kind="key"), 9))


def test_the_fastest_is_measured_once_and_remembered(tmp_path):
    path, runs = tmp_path / "launches.json", fastest(3)
    tuner = Tuner(path, runs.timer)
    assert tuner.choose("a", OPTIONS, runs.run) == OPTIONS[3]
    assert runs.launched == OPTIONS  # each of them once
    assert tuner.choose("a", OPTIONS, runs.run) == OPTIONS[3] and len(runs.launched) == len(OPTIONS)
    other = fastest(0)
    again = Tuner(path, other.timer)  # another process
    assert again.choose("a", OPTIONS, other.run) == OPTIONS[3] and not other.launched
    assert again.choose("b", OPTIONS, other.run) == OPTIONS[0] and other.launched == OPTIONS


def test_processes_that_write_in_turns_lose_nothing(tmp_path):
    path, runs = tmp_path / "launches.json", fastest(1)
    first, second = Tuner(path, runs.timer), Tuner(path, runs.timer)
    first.choose("a", OPTIONS, runs.run)
    second.choose("b", OPTIONS, runs.run)
    assert set(json.loads(path.read_text())) == {"a", "b"}
    assert [file.name for file in tmp_path.iterdir()] == ["launches.json"]  # nothing half-written is left


def test_equal_times_choose_the_default():
    runs = Runs(dict.fromkeys(OPTIONS, 1.0))
    assert Tuner(None, runs.timer).choose("a", OPTIONS, runs.run) == OPTIONS[0]


def test_a_launch_that_fails_is_left_out(tmp_path):
    runs = Runs(dict.fromkeys(OPTIONS, 2.0) | {OPTIONS[0]: None, OPTIONS[1]: None})
    assert Tuner(None, runs.timer).choose("a", OPTIONS, runs.run) == OPTIONS[2]
    nothing = Runs(dict.fromkeys(OPTIONS))
    path = tmp_path / "launches.json"
    assert Tuner(path, nothing.timer).choose("a", OPTIONS, nothing.run) == OPTIONS[0]
    assert not path.exists()  # nothing was learnt


@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b"null", b'{"a": 3}', b'{"a": {"block_m": 64}}', b"\xff\xfe",
    json.dumps({"a": asdict(OPTIONS[1]) | {"unknown": 1}}).encode(),
    json.dumps({"a": asdict(Launch(7, 7, 7, 7))}).encode(),
])  # fmt: skip
def test_a_damaged_or_outdated_file_is_ignored_and_replaced(tmp_path, content):
    path, runs = tmp_path / "launches.json", fastest(2)
    path.write_bytes(content)
    tuner = Tuner(path, runs.timer)
    assert tuner.choose("a", OPTIONS, runs.run, may_measure=False) == OPTIONS[0] and not runs.launched
    assert tuner.choose("a", OPTIONS, runs.run) == OPTIONS[2]
    assert json.loads(path.read_text())["a"] == asdict(OPTIONS[2])


def test_a_folder_that_refuses_is_left_alone(tmp_path):
    runs = fastest(1)
    tuner = Tuner(tmp_path / "missing" / "launches.json", runs.timer)
    assert tuner.choose("a", OPTIONS, runs.run) == OPTIONS[1]
    assert tuner.choose("a", OPTIONS, runs.run) == OPTIONS[1] and len(runs.launched) == len(OPTIONS)


def test_keys_tell_apart_what_matters(monkeypatch):
    def key(shape=SHAPE, device="A", capability=(9, 0)):
        return tuning_key(shape, device, capability)

    changes = [{"kind": "query"}, {"rows": 200}, {"chunk_size": 200}, {"head_dim": 96}, {"dtype": torch.float16}]
    keys = {key(), key(device="B"), key(capability=(8, 0)), key(replace(SHAPE, descriptors=False))}
    keys |= {key(replace(SHAPE, **change)) for change in changes}
    monkeypatch.setattr("triton.__version__", "0")
    assert len(keys | {key()}) == 10
    assert key(replace(SHAPE, rows=65)) == key(replace(SHAPE, rows=128))


def test_without_a_gpu_nothing_is_measured():
    assert choose(SHAPE, torch.device("cpu"), None) == OPTIONS[0]


def test_on_a_gpu_the_choice_is_remembered_unless_determinism_is_asked_for(monkeypatch, tmp_path):
    """The device is a stub, the rest is what runs on one."""
    from kernels.gca import autotune

    runs = fastest(2)
    monkeypatch.setattr(autotune, "_tuner", lambda: Tuner(tmp_path / "launches.json", runs.timer))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stub")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
    device = torch.device("cuda")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose(SHAPE, device, runs.run) == OPTIONS[0] and not runs.launched
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert choose(SHAPE, device, runs.run) == OPTIONS[2] and runs.launched == OPTIONS
    assert choose(SHAPE, device, runs.run) == OPTIONS[2] and len(runs.launched) == len(OPTIONS)
