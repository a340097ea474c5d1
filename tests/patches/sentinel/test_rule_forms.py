import pytest
import torch
from sentinel_cases import ONE, config_of, random_layout, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, Llama4TextConfig, LlamaConfig

from patches.rules import as_attention_mask, causal, dense_mask, index_mask, intersect, sentinel, streaming
from patches.sentinel import masked_forward


def indices(batch_size: int = 2, size: int = 12) -> torch.Tensor:
    return torch.arange(size).expand(batch_size, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_implementation_gets_its_form(dtype):
    rule, wanted = streaming(1, 4), dense_mask(streaming(1, 4), 2, 12)
    model = tiny_model("llama").to(dtype)
    mask = as_attention_mask(model, rule, query_index=indices())
    assert mask.dtype == torch.bool and mask.equal(wanted)
    model.set_attn_implementation("eager")
    mask = as_attention_mask(model, rule, query_index=indices())
    assert mask.dtype == dtype and mask.shape == (2, 1, 12, 12)
    assert mask.eq(0).equal(wanted) and mask[~wanted].eq(torch.finfo(dtype).min).all()


def test_a_peft_wrapper_changes_nothing():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def get_base_model(self):
            return self.model

    model = tiny_model("llama", implementation="eager").to(torch.bfloat16)
    mask = as_attention_mask(Wrapper(model), causal(), query_index=indices())
    assert mask.equal(as_attention_mask(model, causal(), query_index=indices()))


def test_windows_are_measured_on_positions():
    positions = torch.tensor([[0, 1, 1, 2, 3, 3, 4, 5, 9, 10, 11, 20]]).expand(2, -1)
    near = (positions[:, :, None] - positions[:, None, :] < 4)[:, None]
    full = dense_mask(causal(), 2, 12)
    options = {"query_index": indices(), "query_position_ids": positions}
    single = as_attention_mask(tiny_model("mistral", window=4), causal(), **options)
    assert single.equal(full & near) and not single.equal(full)
    for architecture in ("qwen2", "gemma3"):
        masks = as_attention_mask(tiny_model(architecture, window=4), causal(), **options)
        assert set(masks) == {"full_attention", "sliding_attention"}
        assert masks["full_attention"].equal(full) and masks["sliding_attention"].equal(full & near)
    for architecture in ("qwen2", "mistral", "phi3"):
        assert as_attention_mask(tiny_model(architecture), causal(), **options).equal(full)
    default = as_attention_mask(tiny_model("phi3", window=4), causal(), query_index=indices())
    assert default.equal(dense_mask(intersect(causal(), streaming(0, 4)), 2, 12))


def test_queries_over_other_keys():
    query, key = torch.tensor([[8, 9]]), torch.tensor([[-1, 2, 5, 8, 9]])
    key_positions = torch.tensor([[-1, 0, 3, 6, 7]])
    model = tiny_model("mistral", window=4)
    mask = as_attention_mask(
        model,
        causal(),
        query_index=query,
        key_index=key,
        query_position_ids=torch.tensor([[6, 7]]),
        key_position_ids=key_positions,
    )
    assert mask.tolist() == [[[[False, False, True, True, False], [False, False, False, True, True]]]]
    plain = as_attention_mask(tiny_model("llama"), causal(), query_index=query, key_index=key)
    assert plain.equal(index_mask(causal(), query, key))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_equals_sdpa(dtype):
    layout, _, _ = random_layout(2, ONE, batch_size=2, longest=20)
    for window in (None, 5):
        model = tiny_model("gemma3", window=window).to(dtype)
        outputs = []
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            outputs.append(masked_forward(model, layout).float()[layout.kind == 0])
        error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def switched(implementation: str, **changes):
    model = tiny_model("llama", **changes)
    model.config._attn_implementation = implementation
    return model


def smallest(config_class, **options):
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(config_class(**sizes, **options))


REFUSED = {
    "flash 2": (lambda: switched("flash_attention_2"), "takes no attention mask"),
    "flash 3": (lambda: switched("flash_attention_3"), "recurrent_forward"),
    "flash kernel": (lambda: switched("kernels-community/vllm-flash-attn3"), "takes no attention mask"),
    "unknown": (lambda: switched("my_attention"), "unknown attention implementation"),
    "flex on a CPU": (lambda: switched("flex_attention"), "CPU"),
    "ALiBi": (lambda: smallest(BloomConfig), "ALiBi"),
    "optional ALiBi": (lambda: smallest(FalconConfig, alibi=True), "ALiBi"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_ignore_the_rule_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        as_attention_mask(make(), causal(), query_index=indices())


def test_other_layer_types_are_refused():
    class Chunked(nn.Module):
        config = Llama4TextConfig(num_hidden_layers=2, layer_types=["chunked_attention", "full_attention"])

    Chunked.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="chunked_attention"):
        as_attention_mask(Chunked(), causal(), query_index=indices())


def test_flex_with_dropout_is_refused_in_training_only():
    class OnDevice(nn.Module):
        config = LlamaConfig(attention_dropout=0.1)

    OnDevice.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="dropout"):
        as_attention_mask(OnDevice().train(), causal(), query_index=indices().to("meta"))


@pytest.mark.gpu
def test_flex_equals_sdpa_forward_and_backward():
    layout, _, _ = random_layout(2, ONE, batch_size=2, longest=200)
    layout = layout.to("cuda")
    results = []
    for implementation in ("sdpa", "flex_attention"):
        model = tiny_model("llama", hidden_size=64).cuda()
        model.set_attn_implementation(implementation)
        logits = masked_forward(model, layout)[layout.kind == 0]
        logits.logsumexp(-1).sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for sdpa, flex in zip(*results, strict=True):
        assert (flex - sdpa).norm() <= 1e-4 * sdpa.norm()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_configurations_of_the_cases_are_mixed(architecture):
    assert set(config_of(architecture, window=4).layer_types) == {"full_attention", "sliding_attention"}


def test_the_rule_of_a_layout_reaches_the_mask():
    layout, _, _ = random_layout(1, ONE)
    columns = torch.arange(layout.kind.shape[1]).expand_as(layout.kind)
    mask = as_attention_mask(tiny_model("llama"), sentinel(layout), query_index=columns)
    assert mask.equal(dense_mask(sentinel(layout), *layout.kind.shape))
