"""Scores of short contexts against one forward pass per window."""

import copy
import itertools

import pytest
import torch
from causal_lm_cases import FAMILIES, build, dense_nll, token_ids
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

import losses.window_layouts as layouts
from losses.base_scoring import pack_scores, plan_windows, score_base_nll, unpack_scores

SIZES = {"base_length": 16, "base_stride": 12}


def one_by_one(model, input_ids, *, first_window=False, bos_token_id=None, **plan):
    """One forward pass per window, of a model that has seen nothing before."""
    scores = torch.full(input_ids[:, 1:].shape, torch.nan, dtype=torch.float64)
    for start, first, end in plan_windows(input_ids.shape[1], **plan)[0 if first_window else 1 :]:
        for row, tokens in enumerate(input_ids):
            window = tokens[start:end].clone()
            if bos_token_id is not None and tokens[0] == bos_token_id:
                window[0] = bos_token_id
            scores[row, first - 1 : end - 1] = dense_nll(copy.deepcopy(model), window[None])[0, first - start - 1 :]
    return scores


def assert_scores(scores, expected, atol=5e-5):
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("tail", ["align", "short"])
@pytest.mark.parametrize("layout", ["batched", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_and_layout_equals_one_forward_per_window(name, layout, tail):
    model, tokens = build(name), token_ids(2, 45)
    tokens[1, 0] = 1
    expected = one_by_one(model, tokens, first_window=True, bos_token_id=1, tail=tail, **SIZES)
    model.train()
    options = {"first_window": True, "bos_token_id": 1, "tail": tail, "layout": layout} | SIZES
    assert_scores(score_base_nll(model, tokens, **options), expected)
    assert_scores(score_base_nll(model, tokens, windows_per_forward=3, chunk_size=5, **options), expected)


@pytest.mark.parametrize("name", ["dynamic_rotary", "phi3_longrope"])
def test_rotary_frequencies_are_those_of_the_window_whatever_came_before(name):
    model, tokens = build(name), token_ids(1, 45)
    expected = one_by_one(model, tokens, tail="short", **SIZES)
    long_before = dense_nll(model, tokens)
    assert_scores(score_base_nll(model, tokens, tail="short", **SIZES), expected)
    # A length between the window's and the longest keeps the frequencies of the longest: scoring changes nothing.
    after, untouched = dense_nll(model, tokens[:, :30]), copy.deepcopy(build(name))
    dense_nll(untouched, tokens)
    torch.testing.assert_close(after, dense_nll(untouched, tokens[:, :30]))
    torch.testing.assert_close(dense_nll(model, tokens), long_before)


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_targets_that_are_not_valid_are_not_scored_and_padding_has_no_influence(layout):
    model, tokens = build("llama_sdpa"), token_ids(3, 40)
    valid = torch.ones(3, 39, dtype=torch.bool)
    valid[1, 20:], valid[2, 3:] = False, False
    valid[0, 17] = False
    options = SIZES | {"layout": layout, "first_window": True, "valid": valid}
    scores = score_base_nll(model, tokens, **options)
    assert torch.equal(scores.isnan(), ~valid)
    assert_scores(scores, one_by_one(model, tokens, first_window=True, **SIZES).masked_fill(~valid, torch.nan))
    padded = tokens.clone()
    padded[1, 21:], padded[2, 4:] = 0, 0
    assert_scores(score_base_nll(model, padded, **options), scores.double(), atol=1e-6)


def watch(model):
    """Count the passes of the decoder and their tokens."""
    passes = []
    body = model.base_model
    body.register_forward_pre_hook(lambda _, args, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    return passes


def test_all_windows_take_one_pass_and_empty_ones_none():
    model, tokens = build("llama_sdpa"), token_ids(2, 40)
    passes, rows = watch(model), []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    score_base_nll(model, tokens, **SIZES)
    assert passes == [(4, 16)] and rows == [2 * (39 - 15)]
    passes.clear()
    score_base_nll(model, tokens, windows_per_forward=3, **SIZES)
    assert passes == [(3, 16), (1, 16)]
    passes.clear()
    score_base_nll(model, tokens, layout="packed", **SIZES)
    assert passes == [(1, 4 * 16 + 8)]
    passes.clear()
    valid = torch.zeros(2, 39, dtype=torch.bool)
    valid[1, 20] = True
    assert score_base_nll(model, tokens, valid=valid, **SIZES).isnan().sum() == 2 * 39 - 1
    assert passes == [(1, 16)]
    passes.clear()
    assert bool(score_base_nll(model, tokens[:, :16], **SIZES).isnan().all()) and passes == []


def test_only_the_targets_of_the_windows_around_a_token_change():
    model, tokens = build("llama_sdpa"), token_ids(1, 40)
    before = score_base_nll(model, tokens, first_window=True, **SIZES)
    tokens[0, 13] += 1
    changed = (score_base_nll(model, tokens, first_window=True, **SIZES) != before)[0].nonzero()[:, 0] + 1
    # Windows (0, 1, 16), (12, 16, 28) and (24, 28, 40): token 13 is seen by the first two.
    assert changed.tolist() == list(range(13, 28))


class _Drawing(torch.nn.Module):
    """A layer that draws whatever the mode, as careless code does; its value does not matter."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **inputs):
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return self.inner(*args, **inputs) + 0 * torch.rand(1)


def test_nothing_is_left_behind():
    model = build("gpt2_dropout")
    expected = score_base_nll(model, token_ids(1, 40), **SIZES)
    model.train().transformer.h[0].eval()
    model.gradient_checkpointing_enable()
    model.transformer.ln_f = _Drawing(model.transformer.ln_f)
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    scores = score_base_nll(model, token_ids(1, 40), **SIZES)
    assert torch.equal(scores.nan_to_num(), expected.nan_to_num()) and not scores.requires_grad
    assert not scores.is_inference()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes

    def fails(*_):
        raise RuntimeError("inside")

    model.transformer.ln_f.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="inside"):
        score_base_nll(model, token_ids(1, 40), **SIZES)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes


def test_scores_of_a_16_bit_model_are_not_16_bit():
    model = build("llama_sdpa").bfloat16()
    scores = score_base_nll(model, token_ids(2, 40), **SIZES)
    scored = scores[~scores.isnan()]
    assert scores.dtype == torch.float32
    assert float((scored != scored.bfloat16().float()).float().mean()) > 0.9


def test_adapters_take_part_in_scoring():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(build("llama_sdpa"), LoraConfig(r=2, init_lora_weights=False)).eval()
    tokens = token_ids(1, 40)
    assert_scores(score_base_nll(model, tokens, **SIZES), one_by_one(model, tokens, **SIZES))


def test_models_that_cannot_pack_are_refused_and_batched():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.4}
    bloom = BloomForCausalLM(BloomConfig(n_layer=2, **sizes)).eval()
    # Takes position_ids, and lets packed windows see each other all the same.
    falcon = FalconForCausalLM(FalconConfig(num_hidden_layers=2, **sizes)).eval()
    for model in (bloom, falcon):
        with pytest.raises(ValueError, match=f"{type(model).__name__}.*layout='batched'"):
            score_base_nll(model, token_ids(1, 40), layout="packed", **SIZES)
        assert_scores(score_base_nll(model, token_ids(1, 40), **SIZES), one_by_one(model, token_ids(1, 40), **SIZES))


def varlen_attention(module, query, key, value, attention_mask, **options):
    """What variable-length flash attention does, by the borders it is given; without them nothing is cut."""
    calls = varlen_attention.borders
    calls.append((attention_mask, options.get("cu_seq_lens_q"), options.get("max_length_k")))
    borders = options["cu_seq_lens_q"].tolist() if "cu_seq_lens_q" in options else [0, query.shape[2]]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, begin:end] for x in (query, key, value)), is_causal=True, scale=options["scaling"]
        )
        for begin, end in itertools.pairwise(borders)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def test_auto_packs_for_flash_attention_and_tells_it_the_borders():
    from transformers import AttentionInterface

    AttentionInterface.register("flash_for_tests", varlen_attention)
    model, tokens = build("llama_sdpa"), token_ids(2, 45)
    expected = one_by_one(model, tokens, tail="short", **SIZES)
    model.config._attn_implementation = "flash_for_tests"
    varlen_attention.borders = []
    passes = watch(model)
    assert_scores(score_base_nll(model, tokens, tail="short", **SIZES), expected)
    assert passes == [(1, 2 * (16 + 16 + 9) + 8)]
    mask, borders, longest = varlen_attention.borders[0]
    assert mask is None and longest == 16 and borders.tolist() == [0, 16, 32, 41, 57, 73, 82, 90]
    assert not layouts.is_packed(build("llama_sdpa"), "auto") and not layouts.is_packed(model, "batched")


def test_bits_survive():
    scores = torch.tensor([[1.5, float("nan"), -0.0, 1e-42]])
    bits = pack_scores(scores)
    assert bits.dtype == torch.int32 and torch.equal(unpack_scores(bits).view(torch.int32), scores.view(torch.int32))
    for pack, wrong in (
        (pack_scores, scores.double()),
        (pack_scores, bits),
        (unpack_scores, scores),
        (unpack_scores, bits.long()),
    ):
        with pytest.raises(ValueError, match="must be"):
            pack(wrong)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"layout": "ragged"}, "layout"),
        ({"windows_per_forward": 0}, "windows_per_forward"),
        ({"valid": torch.ones(2, 40, dtype=torch.bool)}, "valid"),
        ({"valid": torch.ones(2, 39)}, "valid"),
        ({"base_stride": 16}, "base_stride"),
        ({"base_length": 1}, "base_length"),
        ({"input_ids": torch.zeros(40, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(2, 40)}, "input_ids"),
    ],
)
def test_bad_arguments_are_named(options, word):
    arguments = {"input_ids": token_ids(2, 40)} | SIZES | options
    with pytest.raises(ValueError, match=word):
        score_base_nll(build("llama_sdpa"), arguments.pop("input_ids"), **arguments)
