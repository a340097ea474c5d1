"""Rates from a clock that the tests hold in hand."""

import pytest
import torch

from callbacks import throughput
from callbacks.throughput import Throughput, flops_per_token, peak_tflops


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves one second for each training batch and 100 for each validation batch."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def ticking(lab, clock):
    class Ticking(lab["Module"]):
        def training_step(self, batch, batch_idx):
            clock[0] += 50.0 if batch_idx == 0 else 1.0
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            clock[0] += 100.0
            return super().validation_step(batch, batch_idx, dataloader_idx)

    return Ticking(lab["tiny_llama"]())


def test_training_is_unchanged(assert_changes_nothing):
    assert_changes_nothing(Throughput())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rate_leaves_out_validation_and_the_first_step(fit, lab, clock, accumulate):
    callback = Throughput(window=50)
    trainer, module = fit(
        callback, module=ticking(lab, clock), accumulate_grad_batches=accumulate, val_check_interval=5
    )
    rate = callback.last["perf/tokens_per_second"]
    assert rate == pytest.approx(2 * 16)
    parameters = sum(p.numel() for p in module.parameters())
    assert callback.last["perf/tflops_per_second"] == pytest.approx(rate * 6 * parameters / 1e12)
    assert "perf/mfu" not in callback.last
    assert 0.01 < callback.last["perf/peak_memory_gib"] < 1000
    assert float(trainer.callback_metrics["perf/tokens_per_second"]) == pytest.approx(rate)


def test_average_forgets_old_marks(fit, lab, clock):
    class Faster(lab["Module"]):
        def training_step(self, batch, batch_idx):
            clock[0] += 10.0 if batch_idx < 6 else 1.0
            return super().training_step(batch, batch_idx)

    callback = Throughput(window=1, every_n_steps=2)
    fit(callback, module=Faster(lab["tiny_llama"]()))
    assert callback.last["perf/tokens_per_second"] == pytest.approx(2 * 16)


def test_ranks_share_the_work(fit, lab, clock, monkeypatch):
    strategy = "lightning.pytorch.strategies.SingleDeviceStrategy"
    monkeypatch.setattr(f"{strategy}.distributed_sampler_kwargs", {"num_replicas": 3, "rank": 0}, raising=False)
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 6)  # pairs of processes read the same
    callback = Throughput()
    _, module = fit(callback, module=ticking(lab, clock), val_check_interval=40)
    assert callback.last["perf/tokens_per_second"] == pytest.approx(3 * 2 * 16)
    flops = 6 * sum(p.numel() for p in module.parameters())
    assert callback.last["perf/tflops_per_second"] == pytest.approx(2 * 16 / 2 * flops / 1e12)


def test_mfu_is_the_share_of_the_peak_of_a_known_device(fit, monkeypatch):
    monkeypatch.setattr(throughput, "_device_peak", lambda device: 0.5)
    callback = Throughput()
    trainer, _ = fit(callback)
    assert callback.last["perf/mfu"] == pytest.approx(callback.last["perf/tflops_per_second"] / 0.5)
    assert float(trainer.callback_metrics["perf/mfu"]) == pytest.approx(callback.last["perf/mfu"])


def test_model_knows_its_flops_better():
    class Model(torch.nn.Linear):
        def num_flops_per_token(self, context_length):
            return 7.0 * context_length

    assert flops_per_token(Model(2, 3), 100) == 700.0
    assert flops_per_token(torch.nn.Linear(2, 3), 100) == 6.0 * 9


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_found_by_name(name, peak):
    assert peak_tflops(name) == peak


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match="at least 1"):
        Throughput(window=0)
    with pytest.raises(ValueError, match="at least 1"):
        Throughput(every_n_steps=0)
