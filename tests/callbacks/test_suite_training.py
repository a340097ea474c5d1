"""All callbacks together on the suite's own datamodule, model and module."""

import numpy as np
import pytest
import torch

from callbacks.causality_monitor import CausalityMonitor
from callbacks.nan_guard import NaNGuard, NonFiniteLossError
from callbacks.throughput import Throughput
from callbacks.validation_perplexity import ValidationPerplexity
from datamodules.packed_text import PackedTextDataModule
from evaluation.perplexity import evaluate_perplexity
from lightning_modules.causal_lm import Optimization
from lightning_modules.gca_pretraining import GCAPretrainingModule
from models.drt import DRTConfig, DRTForCausalLM
from preprocess.index import CorpusWriter

STEPS = 6


def drt():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_encoder_layers": 1}
    retrieval = {"num_lower_layers": 1, "layers_per_group": [1], "chunk_size": 5, "chunk_top_k": 2, "window_size": 7}
    ids = {"landmark_token_id": 63, "pad_token_id": 62, "bos_token_id": 61, "eos_token_id": 61}
    return DRTForCausalLM(DRTConfig(vocab_size=64, initializer_range=0.2, **sizes, **retrieval, **ids))


class Poisoned(GCAPretrainingModule):
    """The loss of one micro-batch is not a number."""

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return outputs | {"loss": outputs["loss"] * float("nan")} if batch_idx == 7 else outputs


@pytest.fixture
def train(make_trainer, tmp_path):
    options = {"dtype": "uint16", "tokenizer": "t", "vocab_size": 61, "eos_token_id": 60, "source": "random"}
    for split, size in (("train", 2000), ("validation", 203)):
        with CorpusWriter(tmp_path / split, append_eos=False, **options) as writer:
            writer.add(np.random.default_rng(size).integers(60, size=size), num_bytes=3 * size)

    def run(*callbacks, module=GCAPretrainingModule, ckpt_path=None):
        data = PackedTextDataModule(
            tmp_path,
            context_length=32,
            batch_size=2,
            max_steps=STEPS,
            accumulate_grad_batches=2,
            eval_lengths=[32, 16],
        )
        module = module(drt, optimization=Optimization(lr=1e-2), max_steps=STEPS)
        trainer = make_trainer(
            *callbacks,
            max_steps=STEPS,
            accumulate_grad_batches=2,
            val_check_interval=6,
            use_distributed_sampler=False,
            gradient_clip_val=1.0,
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer, module, data

    return run


def assert_equal(a, b):
    for (name, left), right in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_training_is_unchanged_and_validation_is_the_evaluation(train):
    watch = ValidationPerplexity()
    trainer, watched, data = train(watch, Throughput(), CausalityMonitor(), NaNGuard())
    _, plain, _ = train()
    assert_equal(watched, plain)
    for length, result in watch.last_result["lengths"].items():
        expected = evaluate_perplexity(watched.model, data.validation_corpus, window=int(length))
        assert result["num_targets"] == expected["num_targets"] == 202
        assert result["nll_sum"] == pytest.approx(expected["nll_sum"], rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
        assert result["position_counts"] == expected["position_counts"]
        np.testing.assert_allclose(result["position_nll_sum"], expected["position_nll_sum"], rtol=1e-5)
    assert float(trainer.callback_metrics["perf/tokens_per_second"]) > 0


def test_the_state_saved_before_a_bad_step_continues_as_if_nothing_had_happened(train, tmp_path):
    _, plain, _ = train()
    with pytest.raises(NonFiniteLossError, match="in step 4"):
        train(NaNGuard(), module=Poisoned)
    trainer, resumed, _ = train(NaNGuard(), ckpt_path=tmp_path / "nan_step_3.ckpt")
    assert trainer.global_step == STEPS
    assert_equal(resumed, plain)
