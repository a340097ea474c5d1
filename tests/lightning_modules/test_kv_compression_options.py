"""KV compression training: models and options that go together, and those that are refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from compression_cases import (
    LORA,
    batch,
    make,
    plain_batch,
    tiny_model,
)
from transformers import MptConfig

from lightning_modules.kv_compression import KVCompressionLM
from lightning_modules.sentinel_setup import attention_projections
from patches.sentinel import Sentinels, add_sentinels


def test_models_that_are_built_get_rows_and_given_ones_must_have_them(tmp_path):
    sentinels = Sentinels(128, (129,))
    module = KVCompressionLM(tiny_model, sentinels=sentinels, lora=LORA)
    module.configure_model()
    weight = module.model.get_base_model().model.embed_tokens.weight
    expected = tiny_model()
    assert add_sentinels(expected, 128) == sentinels
    assert torch.equal(weight, expected.model.embed_tokens.weight) and weight.shape[0] == 192
    with pytest.raises(ValueError, match="beyond the 128 rows"):
        make(sentinels=sentinels)
    with torch.no_grad():
        expected.model.embed_tokens.weight[128:130] = 5.0
    expected.save_pretrained(tmp_path)
    sentinels.save(tmp_path)
    loaded = KVCompressionLM(str(tmp_path), sentinels=sentinels, lora=LORA)
    loaded.configure_model()
    assert (loaded.model.get_base_model().model.embed_tokens.weight[128:130] == 5).all()


def test_families_are_found_by_model_type():
    for family, layers in (("llama", 4), ("gpt_neox", 2)):
        module = make(tiny_model(family=family))
        adapted = {n.split(".lora_A")[0] for n, _ in module.model.named_parameters() if "lora_A" in n}
        assert len(adapted) == 2 * layers
        assert not any("mlp" in name for name in adapted)
    with pytest.raises(ValueError, match=r"'mpt' are not known: pass lora.target_modules"):
        attention_projections(MptConfig().model_type)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentinels": None}, "needs sentinels"),
        ({"method": "global"}, "unknown method 'global'"),
        ({"training_mode": "both"}, "training_mode is one of"),
        ({"training_mode": "recurrent", "method": "local"}, "baselines train masked"),
        ({"training_mode": "recurrent", "gradient_checkpointing": True}, "drops the cache"),
        ({"distillation_weight": 1.0, "lora": None}, "without its adapters"),
        ({"distillation_weight": -1.0}, "at least 0"),
        ({"method": "streaming"}, "needs window_size"),
        ({"method": "local", "window_size": 4}, "belongs to method='streaming'"),
        ({"published_labels": True}, "may ask for a sentinel"),
        ({"compression_ratio": 1.0}, r"in \[0, 1\)"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"lora": {"rank": 4}}, "refused by PEFT"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_batches_that_lack_something_are_refused():
    with pytest.raises(ValueError, match="needs kind and span"):
        make().loss(plain_batch())
    with pytest.raises(ValueError, match="keep"):
        make(method="scattered").loss(plain_batch())
    with pytest.raises(ValueError, match="keep"):
        make(method="local").loss(plain_batch(keep=torch.ones(2, 20, dtype=torch.bool)))
    with pytest.raises(ValueError, match="no documents apart"):
        make(training_mode="recurrent").loss(batch() | {"document_ids": batch()["span"]})
    with pytest.raises(ValueError, match="no adapter"):
        make(lora=None).save_adapter("nowhere")


def test_the_model_given_stays_a_plain_model_after_export():
    module = make()
    before = copy.deepcopy(module.model.state_dict())
    module.model_to_export().merged()
    assert all(torch.equal(before[name], value) for name, value in module.model.state_dict().items())


def test_chunks_are_refused_where_weights_are_shared():
    module = make(training_mode="recurrent")
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(zero_stage_3=False))
    module.on_fit_start()
    module._trainer.strategy.zero_stage_3 = True
    with pytest.raises(ValueError, match="use masked, or trainer=ddp"):
        module.on_fit_start()
