"""Each process of a launch knows its number and takes a device of its own."""

import pytest
import torch

from evaluation.processes import Process


def test_alone_and_launched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Process.current() == Process(0, 1, 0) and Process.current().is_first
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Process.current() == Process(5, 8, 1) and not Process.current().is_first


def test_devices(monkeypatch):
    assert Process(3, 4, 3).device("cpu", "float32") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Process(rank, 4, rank).device("auto", "float32").index for rank in range(4)] == [0, 1, 0, 1]
    assert Process(1, 2, 1).device("cuda:0", "float32").index == 0
    with pytest.raises(ValueError, match="cuda:7 was asked for"):
        Process().device("cuda:7", "float32")
