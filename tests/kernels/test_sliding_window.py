import pytest
import torch

from kernels.sliding_window import sliding_window_attention
from kernels.sliding_window.flex import BLOCK, sliding_window_attention_flex, visible_blocks, window_mask


def run(tensors, implementation, window, **options):
    leaves = [tensors[name].detach().clone().requires_grad_() for name in "qkv"]
    out = sliding_window_attention(*leaves, window, implementation=implementation, **options)
    out.backward(tensors["grad_out"])
    return {"out": out.detach()} | {f"grad_{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}


def random_inputs(batch, num_queries, num_keys, heads, kv_heads, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, grad_out = normal(batch, num_queries, heads, size), normal(batch, num_queries, heads, size)
    k, v = normal(batch, num_keys, kv_heads, size), normal(batch, num_keys, kv_heads, size)
    return {"q": q, "k": k, "v": v, "grad_out": grad_out}


def documents(batch, length):
    generator = torch.Generator().manual_seed(1)
    ids = (torch.rand(batch, length, generator=generator) < 0.05).long().cumsum(1)
    ids[0, :5] = -1
    ids[-1, -3:] = -1
    return ids


@pytest.mark.parametrize("implementation", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("name", ["window_alibi", "window_documents"])
def test_fixtures(load, name, implementation):
    t, meta = load(name)
    options = {key: t[key] for key in ("alibi_slopes", "document_ids") if key in t}
    results = run(t, implementation, meta["window_size"], **options)
    for key, result in results.items():
        torch.testing.assert_close(result, t[key], atol=5e-6, rtol=0)


@pytest.mark.parametrize(("batch", "num_queries", "num_keys", "window", "heads", "kv_heads"), [
    (2, 200, 200, 33, 4, 2), (1, 200, 290, 33, 2, 2), (1, 130, 130, None, 2, 1), (1, 1, 300, 64, 2, 1),
    (2, 90, 90, 500, 2, 2), (3, 65, 65, 64, 2, 2), (1, 300, 420, 100, 3, 1),
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("slopes", [None, 1, 2])
def test_blocks_equal_reference(batch, num_queries, num_keys, window, heads, kv_heads, packed, slopes):
    tensors = random_inputs(batch, num_queries, num_keys, heads, kv_heads)
    options = {
        "document_ids": documents(batch, num_keys) if packed else None,
        "alibi_slopes": None if slopes is None else torch.rand((batch, heads)[2 - slopes :]),
    }
    expected, results = run(tensors, "reference", window, **options), run(tensors, "sdpa", window, **options)
    for key in expected:
        torch.testing.assert_close(results[key], expected[key], atol=1e-12, rtol=0)


@pytest.mark.parametrize("tile", [1, 40_000])
def test_any_tile_size_gives_the_same_result(monkeypatch, tile):
    tensors = random_inputs(1, 300, 330, 2, 1)
    options = {"alibi_slopes": torch.rand(2), "document_ids": documents(1, 330)}
    expected = run(tensors, "reference", 50, **options)
    monkeypatch.setitem(__import__("kernels.sliding_window.blocked").sliding_window.blocked.TILE, "cpu", tile)
    results = run(tensors, "sdpa", 50, **options)
    for key in expected:
        torch.testing.assert_close(results[key], expected[key], atol=1e-12, rtol=0)


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_window_of_one_returns_the_own_value(implementation):
    tensors = random_inputs(2, 70, 70, 2, 2, dtype=torch.float32)
    results = run(tensors, implementation, 1, alibi_slopes=torch.rand(2))
    torch.testing.assert_close(results["out"], tensors["v"])
    torch.testing.assert_close(results["grad_v"], tensors["grad_out"])


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_padding_gives_exact_zeros(implementation):
    tensors = random_inputs(2, 80, 80, 2, 1, dtype=torch.float32)
    ids = torch.zeros(2, 80, dtype=torch.long)
    ids[0, :9], ids[1, -70:] = -1, -1
    results = run(tensors, implementation, 16, document_ids=ids)
    for key, result in results.items():
        assert not result[ids < 0].any() and torch.isfinite(result).all(), key


def test_nothing_outside_the_window_has_influence():
    """The gradient of one output reaches exactly the keys of its window."""
    tensors = random_inputs(1, 150, 150, 1, 1)
    tensors["grad_out"].zero_()[0, 100] = 1.0
    reached = run(tensors, "sdpa", 20)["grad_v"].abs().sum((0, 2, 3)) > 0
    assert reached.nonzero().flatten().tolist() == list(range(81, 101))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_upcast_exactly(dtype):
    tensors = random_inputs(1, 100, 100, 2, 2, dtype=dtype)
    wide = {key: t.float() for key, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        results = run(tensors, "sdpa", 30)
    expected = run(wide, "sdpa", 30)
    assert torch.equal(results["out"], expected["out"].to(dtype))
    torch.testing.assert_close(results["grad_v"], expected["grad_v"].to(dtype))


def test_runs_are_bit_identical():
    tensors = random_inputs(2, 500, 500, 2, 1, dtype=torch.float32)
    first, second = run(tensors, "sdpa", 40), run(tensors, "sdpa", 40)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_gradcheck():
    t = random_inputs(1, 7, 9, 2, 1, size=3)
    ids = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, -1]])

    def function(q, k, v):
        options = {"alibi_slopes": torch.tensor([0.5, 0.1]), "document_ids": ids, "implementation": "sdpa"}
        return sliding_window_attention(q, k, v, 4, **options)

    assert torch.autograd.gradcheck(function, tuple(t[name].requires_grad_() for name in "qkv"))


@pytest.mark.parametrize(("implementation", "name"), [("flash", "flash-attn"), ("flex", "flex attention")])
def test_flash_and_flex_name_what_they_need(implementation, name):
    t = random_inputs(1, 4, 4, 1, 1)
    with pytest.raises(ValueError, match=rf"{name} .*use implementation='sdpa'"):
        run(t, implementation, 2)


def test_flash_passes_the_window_on(monkeypatch):
    """The flash-attn call itself: a window of 6 keys is (5, 0) there."""
    import sys
    import types

    from kernels.sliding_window.flash import sliding_window_attention_flash

    seen = {}
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = lambda q, k, v, **options: seen.update(options) or q
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    t = random_inputs(1, 4, 4, 2, 1)
    for window, expected in ((6, (5, 0)), (None, (-1, 0))):
        sliding_window_attention_flash(t["q"], t["k"], t["v"], window, alibi_slopes=torch.ones(2), scale=0.5)
        assert seen["window_size"] == expected and seen["causal"] and seen["softmax_scale"] == 0.5


@pytest.mark.parametrize(("change", "window", "message"), [
    ({"k": torch.zeros(1, 3, 2, 8), "v": torch.zeros(1, 3, 2, 8)}, 2, "at least as many keys"),
    ({"q": torch.zeros(1, 4, 3, 8)}, 2, "multiple"),
    ({"q": torch.zeros(1, 4, 2, 4)}, 2, "expected q"),
    ({"q": torch.zeros(1, 4, 2, 8, dtype=torch.float64)}, 2, "dtype"),
    ({}, 0, "window_size"),
])  # fmt: skip
def test_wrong_arguments_are_refused(change, window, message):
    t = random_inputs(1, 4, 4, 2, 2, dtype=torch.float32) | change
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(t["q"], t["k"], t["v"], window)


@pytest.mark.parametrize("options", [
    {"alibi_slopes": torch.ones(3)},
    {"document_ids": torch.zeros(1, 3).long()},
    {"document_ids": torch.ones(1, 4).bool()},
    {"implementation": "fast"},
])  # fmt: skip
def test_wrong_options_are_refused(options):
    t = random_inputs(1, 4, 4, 2, 2)
    with pytest.raises(ValueError):
        sliding_window_attention(t["q"], t["k"], t["v"], 2, **options)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("batch", "num_queries", "num_keys", "window", "heads", "kv_heads"), [
    (2, 200, 200, 33, 4, 2), (1, 130, 130, None, 2, 1), (1, 1, 300, 64, 2, 1), (2, 150, 290, 500, 2, 2),
])  # fmt: skip
def test_flex_equals_reference(monkeypatch, batch, num_queries, num_keys, window, heads, kv_heads, packed):
    """The functions given to flex attention, on dense scores: it runs on a CPU without compiling, forward only."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    tensors = random_inputs(batch, num_queries, num_keys, heads, kv_heads)
    arguments = tensors["q"], tensors["k"], tensors["v"], window
    for slopes in (None, torch.rand(heads), torch.rand(batch, heads)):
        options = {"alibi_slopes": slopes, "document_ids": documents(batch, num_keys) if packed else None}
        expected = sliding_window_attention(*arguments, scale=0.3, implementation="reference", **options)
        result = sliding_window_attention_flex(*arguments, scale=0.3, compiled=False, **options)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("num_queries", "num_keys", "window"), [
    (1, 1, 1), (128, 128, 128), (129, 129, 2), (300, 300, 513), (300, 1000, 130), (1, 1000, 129), (700, 700, 257),
])  # fmt: skip
def test_flex_visits_the_blocks_that_hold_something_to_see(num_queries, num_keys, window):
    numbers, blocks = visible_blocks(num_queries, num_keys, window, torch.device("cpu"))
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    seen = window_mask(num_keys - num_queries, window, None)(
        0, 0, torch.arange(num_queries)[:, None], torch.arange(num_keys)
    )
    assert torch.equal(seen, (torch.arange(num_keys) <= position) & (torch.arange(num_keys) > position - window))
    padded = torch.nn.functional.pad(seen, (0, -num_keys % BLOCK, 0, -num_queries % BLOCK))
    wanted = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).any(3).any(1)
    found = torch.zeros_like(wanted)
    for row, number in enumerate(numbers[0, 0].tolist()):
        found[row, blocks[0, 0, row, :number].long()] = True
    assert torch.equal(found, wanted) and numbers.sum() == wanted.sum()


def test_auto_prefers_flash_then_flex_then_blocks(monkeypatch):
    import kernels.sliding_window as room

    q = torch.zeros(1, 2, 1, 16)
    assert room._choose("auto", q, None) == "sdpa"
    monkeypatch.setattr(room, "flex_problem", lambda q: None)
    assert room._choose("auto", q, None) == "flex"
    monkeypatch.setattr(room, "flash_problem", lambda q, document_ids: None)
    assert room._choose("auto", q, None) == "flash"


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flex_on_a_gpu(dtype, packed):
    tensors = random_inputs(2, 300, 420, 4, 2, size=64, dtype=dtype)
    options = {"alibi_slopes": torch.rand(4), "document_ids": documents(2, 420) if packed else None}
    expected = run({key: t.double() for key, t in tensors.items()}, "reference", 130, **options)
    cuda = {key: t if t is None else t.cuda() for key, t in (tensors | options).items()}
    results = run(cuda, "flex", 130, **{key: cuda[key] for key in options})
    for key, reference in expected.items():
        error = (results[key].cpu().double() - reference).square().mean().sqrt()
        assert error <= 1e-2 * reference.square().mean().sqrt(), key
