import pytest
import torch
from safetensors.torch import load_file
from sentinel_cases import (
    ARCHITECTURES,
    FIXTURES,
    LAYOUTS,
    ONE,
    TWO,
    WINDOWED,
    assert_logits_close,
    brute_force_logits,
    layout_of,
    random_layout,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from patches.sentinel import PAD, SpanLayout, masked_forward, recurrent_forward


@pytest.fixture(scope="module")
def stored_logits():
    return load_file(FIXTURES / "logits.safetensors")


@pytest.fixture(scope="module")
def stored_llama():
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny_llama").eval()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["one_span", "ragged_batch", "ratio_half_40"])
def test_stored_logits(case, implementation, stored_llama, stored_logits):
    stored_llama.set_attn_implementation(implementation)
    layout, wanted = layout_of(LAYOUTS[case]), stored_logits[f"logits.{case}"]
    assert_logits_close(masked_forward(stored_llama, layout), wanted, layout, 2e-5)
    for chunk_size in (1, 6, 1000):
        logits, cache = recurrent_forward(stored_llama, layout, chunk_size=chunk_size)
        assert_logits_close(logits, wanted, layout, 2e-5)
        assert cache.num_kept.equal(layout.num_kept)
        assert cache.num_physical == layout.num_kept.max()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sentinels", [ONE, TWO], ids=["K1", "K2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_equals_decoding_with_eviction(architecture, sentinels, implementation):
    layout, _, _ = random_layout(3, sentinels, longest=24)
    model = tiny_model(architecture, implementation=implementation)
    masked = masked_forward(model, layout)
    for chunk_size in (1, 6) if implementation == "sdpa" else (6,):
        logits, cache = recurrent_forward(model, layout, chunk_size=chunk_size)
        assert_logits_close(logits, masked, layout)
        assert cache.num_kept.equal(layout.num_kept)
    assert_logits_close(masked, brute_force_logits(model, layout), layout)
    real = layout.kind != PAD
    assert (masked - brute_force_logits(model, layout, causal=True))[real].abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_windows_measure_original_distances(architecture, implementation):
    layout, _, _ = random_layout(5, TWO, longest=30)
    model = tiny_model(architecture, window=7, implementation=implementation)
    masked = masked_forward(model, layout)
    logits, _ = recurrent_forward(model, layout, chunk_size=5)
    assert_logits_close(logits, masked, layout)
    assert_logits_close(masked, brute_force_logits(model, layout, 7), layout)
    without = masked_forward(tiny_model(architecture, implementation=implementation), layout)
    assert (masked - without)[layout.kind != PAD].abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_spans_the_model_is_unchanged(architecture):
    model = tiny_model(architecture).double()
    ids = torch.randint(3, 100, (2, 19), generator=torch.Generator().manual_seed(0))
    layout = SpanLayout.from_spans(ids, [[], []], ONE)
    plain = model(input_ids=ids).logits
    assert_logits_close(masked_forward(model, layout), plain, layout, 1e-6)
    assert_logits_close(recurrent_forward(model, layout, chunk_size=7)[0], plain, layout, 1e-6)


def gradients(model, logits, layout):
    weight = torch.linspace(-1, 1, logits.shape[-1])
    model.zero_grad()
    ((logits.log_softmax(-1) @ weight) * (layout.kind != PAD)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen2"])
def test_gradients_agree_and_reach_the_sentinels(architecture):
    layout, _, _ = random_layout(4, TWO, longest=20)
    model = tiny_model(architecture).train()
    masked = gradients(model, masked_forward(model, layout), layout)
    passes = {f"chunk {size}": recurrent_forward(model, layout, chunk_size=size)[0] for size in (1, 7)}
    passes["brute force"] = brute_force_logits(model, layout)
    for name, logits in passes.items():
        for parameter, gradient in gradients(model, logits, layout).items():
            error = (gradient - masked[parameter]).norm() / masked[parameter].norm().clamp(min=1e-6)
            assert error < 1e-5, (name, parameter, error)
    rows = next(value for name, value in masked.items() if "embed" in name)[list(TWO.ids)]
    assert rows.norm(dim=1).gt(1e-4).all()


@torch.no_grad()
def test_repeated_positions_are_not_cut_in_training_mode():
    layout, _, _ = random_layout(3, TWO)
    model = tiny_model("llama")
    assert masked_forward(model.train(), layout).equal(masked_forward(model.eval(), layout))
    cut = model(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False).logits
    assert (cut - masked_forward(model, layout))[layout.kind != PAD].abs().max() > 0.05


@torch.no_grad()
def test_a_layout_continues_a_cache():
    first, _, _ = random_layout(6, TWO, batch_size=2)
    rows, more = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15]], [[(0, 4)], [(1, 4)]]
    second = SpanLayout.from_spans(rows, more, TWO)
    model = tiny_model("llama")
    _, cache = recurrent_forward(model, first, chunk_size=8)
    logits, cache = recurrent_forward(model, second, chunk_size=3, cache=cache)
    for row in range(2):
        ids = [layout.input_ids[row][layout.kind[row] != PAD] for layout in (first, second)]
        joined = SpanLayout.from_ids(torch.cat(ids)[None], TWO)
        wanted = masked_forward(model, joined)[:, ids[0].shape[0] :]
        assert (logits[row : row + 1, : ids[1].shape[0]] - wanted).abs().max() < 1e-5
        assert cache.num_kept[row] == joined.num_kept[0]


@torch.no_grad()
def test_chunks_hold_no_more_than_live_entries_chunk_and_open_spans(monkeypatch):
    layout, _, _ = random_layout(7, ONE, batch_size=1, longest=60)
    model, held = tiny_model("llama"), []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, **options: held.append(options) or forward(self, **options)
    )
    recurrent_forward(model, layout, chunk_size=4)
    sizes = [options["attention_mask"].shape[-1] for options in held]
    size = layout.kind.shape[1]
    before = [0, *(int(layout.needed(column - 1).sum()) for column in range(4, size, 4))]
    assert sizes == [live + min(4, size - 4 * number) for number, live in enumerate(before)]
    with pytest.raises(ValueError, match="chunk_size"):
        recurrent_forward(model, layout, chunk_size=0)
