"""The GPU cases at tiny sizes on a CPU: they check, count and compare; the times mean nothing here."""

import importlib
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.deepspeed_gpu import compare as compare_strategies
from benchmarks.gca_gpu import Shape, compare, peak
from benchmarks.linear_cross_entropy_gpu import Head
from benchmarks.linear_cross_entropy_gpu import compare as compare_heads
from benchmarks.long_context_gpu import Prefill, offload, prefill
from benchmarks.registry import CASES
from benchmarks.training_gpu import FineTuning, Pretraining, fine_tuning, pretraining, products_of, trainer_of

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "window_size": 17}
RETRIEVAL = {"num_lower_layers": 1, "layers_per_group": [1], "num_encoder_layers": 1, "chunk_size": 7}
TINY = Pretraining(56, 2, 64, "cpu", SIZES, RETRIEVAL)
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 64}


def by_peer(rows):
    return {row.peer: row for row in rows}


def test_every_case_is_registered_and_skipped_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = {"T3", "T4", "T5", "A10", "A11", "A12", "A14", "L5", "I3", "I4"}
    assert run.main(sorted(gpu)) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert {line.split(":")[0] for line in skipped} == gpu
    assert all(line.endswith("skipped, needs a CUDA device") for line in skipped)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.registry.find_spec", lambda name: None)
    (case,) = (case for case in CASES if case.id == "T5")
    assert case.problem() == "needs deepspeed (pip install --no-build-isolation -r requirements-gpu.txt)"


def test_attention_and_its_peers():
    shape = Shape(2, 3, 2, 4, 2, 8, "cpu")
    targets = dict.fromkeys(("matrix product", "gathered", "SDPA, gathered before", "causal SDPA"), (1.0, None))
    rows = by_peer(compare(shape, targets, backward=False))
    assert rows.keys() == targets.keys() and all(row.ratio > 0 for row in rows.values())
    assert by_peer(compare(shape, {"gathered": (1.0, None)}, backward=True))["gathered"].measure.startswith("forward +")
    assert shape.slot_products == 2 * 3 * 64 * 2 * 64 * 4 * 8
    (row,) = peak(shape)
    assert row.other == 2 * 2 * (2 * 3 * 2 * 64 * 2 * 8) * 2  # twice keys and values of every slot, two bytes each


def test_a_wrong_result_is_not_timed(monkeypatch):
    module = importlib.import_module("benchmarks.gca_gpu")
    right = module.grouped_cross_attention
    monkeypatch.setattr(module, "grouped_cross_attention", lambda *inputs: 1.1 * right(*inputs))
    with pytest.raises(ArithmeticError, match="is wrong"):
        next(compare(Shape(1, 2, 1, 2, 1, 8, "cpu"), {"gathered": (1.0, None)}, backward=False))


def test_loss_of_a_head(monkeypatch):
    rows = by_peer(compare_heads(Head(40, 300, 16, "cpu")))
    assert {"matrix product", "naive", "1 GiB"} <= rows.keys()
    assert 0 < rows["1 GiB"].ours < 2**24

    def naive(*inputs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("benchmarks.linear_cross_entropy_gpu.naive", naive)
    left = by_peer(compare_heads(Head(40, 300, 16, "cpu")))  # a peer that does not fit is left out
    assert rows.keys() - left.keys() == {"naive"}


def test_the_guide_names_every_case_and_group():
    guide = (Path(run.__file__).parent / "README.md").read_text()
    for case in run.select([]):
        assert f"`{case.group}`" in guide and f" {case.id}" in guide, case


def test_pretraining_counts_the_flops_of_its_model():
    rows = by_peer(pretraining(TINY, 1e12))
    ours = rows["1 TFLOP/s"]
    assert ours.other == pytest.approx(TINY.drt().num_flops_per_token(56) * 112 / 1e12)
    assert ours.ratio == pytest.approx(ours.other / ours.ours)
    longer, base = rows["contexts of 56"], rows["sliding window, as many blocks"]
    assert longer.shape.endswith("1 x 112 tokens, bf16 autocast") and longer.other == base.ours == ours.ours


def test_fine_tuning_counts_what_is_executed():
    problem = FineTuning(96, "cpu", LLAMA)
    rows = by_peer(fine_tuning(problem, 1e12))
    width, inner, layers, vocabulary, length = 32, 48, 2, 64, 96
    linear = layers * (2 * width * width + 2 * width * width // 2 + 3 * width * inner)
    adapters = layers * 16 * (6 * width + 2 * width // 2)
    # Forward twice and the gradient of the inputs, of the adapters also of the weights; the frozen head in one sweep.
    products = 2 * length * (3 * linear + 4 * adapters) + 4 * (length - 1) * vocabulary * width
    assert rows["1 TFLOP/s"].other * 1e12 == pytest.approx(products + problem.attention_flops(), rel=0.1)
    model = problem.model()
    assert 2 * sum(p.numel() for p in model.parameters()) < rows["45 GiB"].ours < 2**24
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    trainer_of(model, lambda tokens: model(tokens).logits.float().logsumexp(-1).mean(), problem.tokens())()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, frozen[name])}
    assert changed and all("lora_" in name for name in changed)
    assert products_of(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_prefill_and_offload():
    problem = Prefill(TINY, segment=28, million=84, longest=112)
    rows = by_peer(prefill(problem))
    assert rows.keys() == {"matrix product", "30 s", "60 GB"} and rows["60 GB"].ours > 0
    copies = by_peer(offload(problem))["retrievals"]
    assert copies.other == 2 and not copies.broken  # three calls, one retrieval group


def test_strategies_are_compared_by_their_losses(monkeypatch):
    monkeypatch.setattr("benchmarks.training.LENGTH", 64)
    monkeypatch.setattr("benchmarks.training.WIDTH", 32)
    plain = {"accelerator": "cpu"}
    others = {"again": lambda: plain, "loose": lambda: plain | {"precision": "bf16-mixed"}}
    again, loose = compare_strategies(plain, others)
    assert again.ours == 0.0 and not again.broken and 0.0 < loose.ours < 0.1
