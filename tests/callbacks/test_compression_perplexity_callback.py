"""The callback reports what `perplexity` gives, and training does not notice it."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from callbacks.compression_perplexity import CompressionPerplexity
from datamodules.sentinel import SentinelTextDataModule
from evaluation.kv_compression import perplexity
from lightning_modules.kv_compression import KVCompressionLM
from patches.sentinel import Sentinels, SpanSampler

SENTINELS = Sentinels(259, (260,))


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def train(corpus, callbacks, **module_options):
    module = KVCompressionLM(tiny_llama(), sentinels=SENTINELS, learning_rate=1e-2, **module_options)
    data = SentinelTextDataModule(
        corpus, sentinels=SENTINELS, method=module.compression.method, context_length=32, batch_size=2, max_steps=4
    )
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        **options,
        max_steps=4,
        val_check_interval=2,
        limit_val_batches=1,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=data)
    return trainer, module, data


def test_reports_of_several_ratios_and_weights_as_without_it(tiny_corpus):
    callback = CompressionPerplexity([0.3, 0.6], num_blocks=3)
    trainer, module, data = train(tiny_corpus, [callback])
    blocks = [data.validation_blocks[i] for i in range(3)]
    for name, method, ratio in (("dense", "dense", 0.0), ("at_0.3", "sentinel", 0.3), ("at_0.6", "sentinel", 0.6)):
        options = {"method": method, "compression_ratio": ratio, "sentinels": SENTINELS}
        wanted = perplexity(module.model, blocks, sampler=SpanSampler(ratio), **options)
        assert callback.last_result["compression"][name]["nll_sum"] == pytest.approx(wanted["nll_sum"], rel=1e-6)
        assert trainer.callback_metrics[f"val/perplexity_{name}"].item() == pytest.approx(
            wanted["perplexity"], rel=1e-5
        )
    assert callback.last_result["step"] == 4
    again = CompressionPerplexity()
    again.load_state_dict(callback.state_dict())
    assert again.last_result == callback.last_result
    alone = train(tiny_corpus, [])[1].model.state_dict()
    assert all(torch.equal(alone[name], value) for name, value in module.model.state_dict().items())


def test_a_baseline_is_scored_with_the_options_of_the_module(tiny_corpus):
    callback = CompressionPerplexity([0.6], num_blocks=2)
    options = {"method": "streaming", "num_sinks": 1, "exclude_sentinel_logits": False}
    _, module, data = train(tiny_corpus, [callback], window_size=9, **options)
    blocks = [data.validation_blocks[i] for i in range(2)]

    def score(**changes):
        given = options | {"compression_ratio": 0.6, "sentinels": SENTINELS} | changes
        return perplexity(module.model, blocks, sampler=SpanSampler(0.6), **given)["nll_sum"]

    found = callback.last_result["compression"]["at_0.6"]["nll_sum"]
    assert found == pytest.approx(score(), rel=1e-6)
    for change in ({"num_sinks": 4}, {"exclude_sentinel_logits": True}):
        assert found != pytest.approx(score(**change), rel=1e-5)


def test_a_dense_model_is_scored_once(tiny_corpus):
    callback = CompressionPerplexity(num_blocks=1)
    train(tiny_corpus, [callback], method="dense")
    assert set(callback.last_result["compression"]) == {"dense"}


def test_nothing_is_scored_in_a_sanity_check():
    callback = CompressionPerplexity()
    callback.on_validation_epoch_end(SimpleNamespace(sanity_checking=True), None)
    assert callback.last_result is None


@pytest.mark.parametrize("options", [{"ratios": [0.0]}, {"ratios": [1.0]}, {"num_blocks": 0}, {"batch_size": 0}])
def test_refusals(options):
    with pytest.raises(ValueError, match="got"):
        CompressionPerplexity(**options)
