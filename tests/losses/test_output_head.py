"""The head path against the logits of the models themselves."""

import pytest
import torch
import torch.nn.functional as F
from causal_lm_cases import FAMILIES, SIZES, build, dense_nll, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from losses.output_head import evaluation_mode, hidden_states, output_head, verify_head


@pytest.mark.parametrize("name", FAMILIES)
def test_head_path_equals_the_models_own_logits(name):
    model, tokens = build(name), token_ids(2, 15)
    verify_head(model)
    with torch.no_grad():
        hidden = hidden_states(model, tokens)
        own = model(input_ids=tokens, use_cache=False).logits
        head = output_head(model)
        assert hidden.shape == (*tokens.shape, head.weight.shape[1])
        torch.testing.assert_close(head.logits(hidden), own, rtol=1e-5, atol=1e-5)
        nll = head.nll(hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), chunk_size=7)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.view(2, 14).double(), dense_nll(model, tokens), rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", ["llama_tied", "granite", "gemma2", "phi_bias", "drt"])
def test_gradients_equal_those_through_the_logits(name):
    model, tokens = build(name), token_ids(2, 11)
    targets, scale = tokens[:, 1:].flatten(), torch.linspace(-1, 1, 20)
    output_head(model).nll(hidden_states(model, tokens)[:, :-1].flatten(0, 1), targets).mul(scale).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, targets, reduction="none").mul(scale).sum().backward()
    assert ours
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-4:
            error = (ours[parameter_name] - parameter.grad).norm() / parameter.grad.norm()
            assert float(error) < 1e-4, parameter_name


def test_ignored_targets_count_nothing():
    model, tokens = build("llama_sdpa"), token_ids(1, 6)
    hidden = hidden_states(model, tokens)[0].detach()
    targets = tokens[0].clone()
    targets[2] = -1
    nll = output_head(model).nll(hidden.masked_fill((targets < 0)[:, None], torch.nan), targets, ignore_index=-1)
    assert float(nll.detach()[2]) == 0 and bool((nll[targets >= 0] > 0).all())


def test_the_loss_is_computed_inside_the_hooks_of_the_layer():
    """A sharded weight exists between the hooks only."""
    model, tokens = build("llama_sdpa"), token_ids(1, 6)
    weight, hidden = model.lm_head.weight, hidden_states(model, tokens)[0].detach()
    expected = output_head(model).nll(hidden, tokens[0])
    full, empty = weight.data, weight.data.new_empty(0)
    weight.data = empty
    model.lm_head.register_forward_pre_hook(lambda *_: setattr(weight, "data", full))
    model.lm_head.register_forward_hook(lambda *_: setattr(weight, "data", empty))
    assert torch.equal(output_head(model).nll(hidden, tokens[0]), expected)
    verify_head(model)
    weight.data = full
    assert model.lm_head(hidden).shape == (6, 61) and "forward" not in vars(model.lm_head)


def test_the_layer_is_itself_again_after_an_error():
    model = build("llama_sdpa")
    model.lm_head.forward = replaced = model.lm_head.forward
    with pytest.raises(ValueError, match="targets"):
        output_head(model).nll(torch.zeros(3, 32), torch.zeros(2, dtype=torch.long))
    assert model.lm_head.forward is replaced


class _Scaled(LlamaForCausalLM):
    """Multiplies its logits, and its configuration does not say so."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits * 1.01
        return output


class _Capped(LlamaForCausalLM):
    """Caps logits that are far below the cap."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = torch.tanh(output.logits / 100) * 100
        return output


# One per cent is within the rounding of bfloat16 logits.
@pytest.mark.parametrize(
    ("kind", "dtype"), [(_Scaled, torch.float32), (_Capped, torch.float32), (_Capped, torch.bfloat16)]
)
def test_other_logits_are_refused(kind, dtype):
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES | {"initializer_range": 0.05})).to(dtype)
    with pytest.raises(ValueError, match=kind.__name__):
        verify_head(model)


def test_a_soft_cap_under_another_name_is_refused():
    config = RecurrentGemmaConfig(**SIZES | {"lru_width": 32, "block_types": ["recurrent", "attention"]})
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM"):
        verify_head(RecurrentGemmaForCausalLM(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama_sdpa", "gemma2", "granite", "cohere", "drt"])
def test_other_dtypes_are_verified(name, dtype):
    verify_head(build(name).to(dtype))


def test_a_model_on_the_meta_device_passes_and_an_untrained_zero_head_too():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    verify_head(model)
    model = build("llama_sdpa")
    nn.init.zeros_(model.lm_head.weight)
    verify_head(model)


def adapted(name="llama_sdpa", **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(build(name), LoraConfig(r=2, init_lora_weights=False, **options))


def test_adapters_in_the_body_take_part():
    model, tokens = adapted(target_modules=["q_proj", "v_proj"]), token_ids(2, 9)
    verify_head(model)
    with evaluation_mode(model), torch.no_grad():
        hidden = hidden_states(model, tokens)
        own = model(input_ids=tokens).logits
        torch.testing.assert_close(output_head(model).logits(hidden), own)
        with model.disable_adapter():
            assert not torch.allclose(hidden_states(model, tokens), hidden)


def test_a_fully_trained_copy_of_the_head_is_the_head():
    model, tokens = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), token_ids(1, 9)
    copy = model.base_model.model.lm_head.modules_to_save["default"]
    nn.init.normal_(copy.weight)
    verify_head(model)
    assert output_head(model).weight is copy.weight
    with model.disable_adapter():
        verify_head(model)
        assert output_head(model).weight is not copy.weight
    output_head(model).nll(hidden_states(model, tokens)[0], tokens[0]).sum().backward()
    assert float(copy.weight.grad.norm()) > 0


def test_an_adapted_head_is_refused():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is a peft\..*Linear.*lm_head"):
        output_head(adapted(target_modules=["lm_head"]))


def test_a_head_that_is_no_linear_layer_is_refused():
    model = build("llama_sdpa")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="Sequential"):
        verify_head(model)


def test_modes_come_back_one_by_one():
    model = build("gpt2_dropout").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before and any(before) and not all(before)
    verify_head(model)
    assert [module.training for module in model.modules()] == before
