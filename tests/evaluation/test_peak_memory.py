"""Peak memory is that of the device where the work is done."""

import torch

from evaluation.peak_memory import PeakMemory


def test_the_device_of_the_work_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
    with PeakMemory(torch.device("cuda", 1)) as memory:
        assert memory.bytes() == 7
    assert asked == [torch.device("cuda", 1)] * 2


def test_work_on_the_cpu_is_that_of_the_process():
    with PeakMemory(torch.device("cpu")) as memory:
        before = memory.bytes()
        block = torch.ones(1 << 23)
        assert before is None or memory.bytes() >= before + block.nbytes // 2
