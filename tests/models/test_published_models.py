"""Results of the published code and of a dense float64 computation."""

import pytest
import torch
from model_cases import fixture, part, relative_error

import models
from models.drt import DRTConfig, DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM


def test_drt_equals_the_published_model():
    metadata, tensors = fixture("drt_published_s63")
    config = DRTConfig.from_reference_config(metadata["reference_config"], retrieval_noise=None)
    assert (config.softmax_off_by_one, config.window_size, config.layers_per_group) == (True, 41, [1, 1])
    model = DRTForCausalLM.from_reference_state_dict(part(tensors, "weights/"), config).train()
    ids = tensors["input_ids"].long()
    output = model(ids, labels=ids, output_retrieval=True)
    output.loss.backward()
    torch.testing.assert_close(output.logits, tensors["logits"], atol=2e-5, rtol=0)
    assert abs(output.loss.item() - tensors["loss"].item()) <= 2e-6
    _check_gradients(model, part(tensors, "grads/"), 1e-4)
    for group, (indices, weights) in enumerate(output.retrieval):
        assert indices.dtype == torch.int32
        assert torch.equal(indices, tensors[f"retrieval/{group}/indices"])
        torch.testing.assert_close(weights[:, :7], tensors[f"retrieval/{group}/weights"], atol=2e-5, rtol=0)


def test_sliding_window_lm_equals_the_published_model():
    metadata, tensors = fixture("sliding_window_lm")
    config = SlidingWindowLMConfig.from_reference_config(metadata["reference_config"])
    assert (config.window_size, config.num_hidden_layers) == (25, 2)
    weights = {f"module.language_model.{name}": tensor for name, tensor in part(tensors, "weights/").items()}
    model = SlidingWindowLMForCausalLM.from_reference_state_dict(weights, config)
    ids = tensors["input_ids"].long()
    output = model(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, tensors["logits"], atol=2e-5, rtol=0)
    assert abs(output.loss.item() - tensors["loss"].item()) <= 2e-6
    _check_gradients(model, part(tensors, "grads/"), 1e-4)


def test_packed_documents_equal_the_dense_computation():
    metadata, tensors = fixture("drt_extended")
    config = DRTConfig(**metadata["config"], retrieval_noise=None)
    model = DRTForCausalLM.from_reference_state_dict(part(tensors, "weights/"), config).train()
    ids = tensors["packed/input_ids"].long()
    output = model(ids, labels=ids, document_ids=tensors["packed/document_ids"])
    output.loss.backward()
    torch.testing.assert_close(output.logits, tensors["packed/logits"], atol=1e-4, rtol=0)
    assert abs(output.loss.item() - tensors["packed/loss"].item()) <= 5e-6
    _check_gradients(model, part(tensors, "grads/"), 2e-4)


def test_padded_rows_equal_the_dense_computation():
    metadata, tensors = fixture("drt_extended")
    model = DRTForCausalLM.from_reference_state_dict(part(tensors, "weights/"), DRTConfig(**metadata["config"])).eval()
    ids, mask = tensors["padded/input_ids"].long(), tensors["padded/attention_mask"]
    output = model(ids, labels=ids, attention_mask=mask, output_retrieval=True)
    valid = mask.bool()
    torch.testing.assert_close(output.logits[valid], tensors["padded/logits"][valid], atol=1e-4, rtol=0)
    assert torch.isfinite(output.logits).all()
    assert abs(output.loss.item() - tensors["padded/loss"].item()) <= 5e-6
    for group, (indices, weights) in enumerate(output.retrieval):
        assert torch.equal(indices, tensors[f"padded/retrieval/{group}/indices"])
        torch.testing.assert_close(weights, tensors[f"padded/retrieval/{group}/weights"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["drt_published_s63", "sliding_window_lm"])
def test_export_gives_back_the_published_state_dict(name):
    metadata, tensors = fixture(name)
    config_class, model_class = {
        "drt_published_s63": (DRTConfig, DRTForCausalLM),
        "sliding_window_lm": (SlidingWindowLMConfig, SlidingWindowLMForCausalLM),
    }[name]
    weights = part(tensors, "weights/")
    model = model_class.from_reference_state_dict(
        weights, config_class.from_reference_config(metadata["reference_config"])
    )
    exported = model.to_reference_state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)


def test_published_state_dict_is_checked():
    metadata, tensors = fixture("drt_published_s63")
    config = DRTConfig.from_reference_config(metadata["reference_config"])
    weights = part(tensors, "weights/")
    embedding = weights["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embedding.clone(), "model.lower_layers.0.self_attn.m": torch.ones(1)}
    DRTForCausalLM.from_reference_state_dict({**weights, **extra}, config)
    with pytest.raises(ValueError, match=r"unexpected 1 \(model.other\)"):
        DRTForCausalLM.from_reference_state_dict({**weights, "model.other": embedding}, config)
    with pytest.raises(ValueError, match="missing 1"):
        DRTForCausalLM.from_reference_state_dict({k: v for k, v in weights.items() if k != "model.norm.weight"}, config)
    with pytest.raises(ValueError, match="tied"):
        DRTForCausalLM.from_reference_state_dict({**weights, "lm_head.weight": embedding + 1}, config)
    with pytest.raises(ValueError, match="shape"):
        DRTForCausalLM.from_reference_state_dict({**weights, "model.norm.weight": torch.ones(5)}, config)
    model = DRTForCausalLM.from_reference_state_dict(
        {"model.norm.weight": torch.full((32,), 3.0)}, config, strict=False
    )
    assert model.model.norm.weight[0] == 3


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DRTConfig(), 145_980_672),
        (DRTConfig(layers_per_group=[3, 3]), 145_981_440),
        (SlidingWindowLMConfig(), 123_557_376),
        (SlidingWindowLMConfig(num_hidden_layers=14), 137_716_224),
    ],
)
def test_parameter_counts_and_meta_device(config, count):
    with torch.device("meta"):
        model = models.AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == count
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())


def test_flops_per_token_of_the_published_model():
    with torch.device("meta"):
        model = DRTForCausalLM(DRTConfig())
    # 6 FLOPs per parameter and attention over 513 + 504 keys, 962 million, plus one landmark per 63 tokens.
    assert model.num_flops_per_token(16380) == pytest.approx(962e6, rel=0.015)
    assert model.num_flops_per_token(1 << 20) < 1.01 * model.num_flops_per_token(16380)


def _check_gradients(model, reference, tolerance):
    gradients = model.to_reference_state_dict(gradients=True)
    assert gradients.keys() == reference.keys()
    for name, expected in reference.items():
        assert relative_error(gradients[name], expected) <= tolerance, name
