"""Statistics of the query pass by their definitions, and what a GPU must give."""

import copy

import pytest
import torch
from piece_models import SIZES, Largest, pieces_of, text, tiny_model
from piece_reference import Reference, run_reference
from transformers import AutoConfig, AutoModelForCausalLM

from patches.parallel_context import APE, ParallelContext, SelectiveAttention
from patches.parallel_context.fused import attend_fused, fused_problem
from patches.parallel_context.key_groups import KeyPart
from patches.parallel_context.meters import METERS
from patches.parallel_context.problem import Own, Problem
from patches.parallel_context.tiled import attend_tiled

PREFIX, PIECES, QUERY = text(3, 1), pieces_of((7, 4, 9), 2), text(5, 9)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window"])
def test_norms_and_angles(family):
    model = tiny_model(family)
    reference = Reference(PREFIX, PIECES, QUERY, "ML")
    run_reference(model, reference)
    with ParallelContext(position_mode="ML", prefix=None).bind(model) as pc:
        found = pc.score(pc.encode(PIECES, prefix=PREFIX), QUERY, meters=METERS).meters
    assert set(found) == set(METERS)
    places, count = reference.places(), len(QUERY)
    for layer in range(3):
        query, key = reference.queries[layer][0, :, -count:], reference.keys[layer][0]
        key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
        config = model.config
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None) if not kinds or kinds[layer] == "sliding_attention" else None
        slot = torch.arange(len(places))
        visible = slot <= slot[-count:, None]
        if window is not None:
            visible &= places[-count:, None] - places < window
        logits = query @ key.mT * model.get_decoder().layers[layer].self_attn.scaling
        cap = getattr(config, "attn_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        cosine = torch.nn.functional.cosine_similarity(query[:, :, None], key[:, None], dim=-1)
        expected = {
            "query_norm": query.norm(dim=-1),
            "logit_scale": (logits.abs() * visible).sum(-1) / visible.sum(-1),
            "cosine": (cosine * visible).sum(-1) / visible.sum(-1),
        }
        for name, value in expected.items():
            assert (found[name][layer, 0] - value).abs().max() < 1e-5, name
    assert found["output_norm"].shape == found["entropy"].shape and (found["output_norm"] > 0).all()


def test_generated_tokens_weigh_as_much_as_query_tokens():
    with ParallelContext().bind(tiny_model()) as pc:
        state = pc.encode(PIECES)
        out = pc.generate(state, QUERY, max_new_tokens=4, eos_token_id=None, meters=["mass", "mass_per_token"])
        whole = pc.score(state, QUERY + out.token_ids[0][:3], meters=["mass", "mass_per_token"]).meters
    assert out.meters["mass_per_token"].shape == (3, 1, 4, 8, 5)
    for name, expected in whole.items():
        assert (out.meters[name] - expected).abs().max() < 1e-9


def test_key_heads_are_never_repeated():
    """Reading a query makes no tensor as large as the keys of one layer with repeated heads."""
    model = tiny_model("llama", torch.float32, layers=2)
    with ParallelContext(degree=8).bind(model) as pc:
        state = pc.encode(pc.options.split(text(2048)))
    for options in ({}, {"selection": SelectiveAttention(2)}, {"ape": APE()}, {"implementation": "eager"}):
        with ParallelContext(**options).bind(model) as pc, Largest() as watch:
            pc.score(state, text(4, 1))
            pc.generate(state, text(4, 1), max_new_tokens=3, eos_token_id=None)
        assert watch.elements < state.keys[0].numel() * 2


def random_problem(device, dtype, **options):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    counts = (((3, 20, 20, 7),), ((3, 11, 0, 0),))
    context = KeyPart(normal(2, 2, 50, 64), normal(2, 2, 50, 64), counts)
    own = Own(normal(2, 2, 9, 64), normal(2, 2, 9, 64))
    return Problem(normal(2, 6, 9, 64), (context,), own, scale=0.2, num_pieces=(3, 1), **options)


@pytest.mark.parametrize("ape", [None, APE(0.6, 1.1)])
@pytest.mark.parametrize("wants", [(), ("entropy",), ("entropy", "mass")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_groups_agree_with_tiles(dtype, wants, ape):
    problem = random_problem("cpu", dtype, ape=ape)
    half = dtype == torch.bfloat16
    assert (fused_problem(problem, frozenset(wants)) is None) == (not half or "entropy" not in wants)
    expected = attend_tiled(problem, frozenset(wants))
    found = attend_fused(problem, frozenset(wants))
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name in ("output", "lse", *wants):
        assert (getattr(found, name) - getattr(expected, name)).abs().max() < limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("ape", [None, APE(0.6, 1.1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_groups_on_a_gpu(dtype, ape):
    wants = frozenset({"entropy", "mass"})
    problem = random_problem("cuda", dtype, ape=ape)
    assert fused_problem(problem, frozenset({"mass"})) is None
    exact = attend_tiled(random_problem("cpu", dtype, ape=ape), wants)
    tiled, fused = attend_tiled(problem, wants), attend_fused(problem, frozenset({"mass"}))
    assert (tiled.entropy.cpu() - exact.entropy).abs().max() < 1e-2
    for found in (tiled, fused):
        assert (found.output.cpu().float() - exact.output.float()).abs().max() < 2e-2
        for name in ("lse", "mass"):
            assert (getattr(found, name).cpu() - getattr(exact, name)).abs().max() < 1e-2, name


CUDA = [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), *CUDA])
@pytest.mark.parametrize("policy", ["plain", "soft", "ape"])
def test_half_precision(device, dtype, policy):
    """Policies that are continuous: a hard choice between close scores may turn."""
    sizes = SIZES | {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 4096}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval().to(device)
    soft = {"selection": SelectiveAttention(soft_temperature=1.0)}
    options = {"plain": {}, "soft": soft, "ape": {"ape": APE()}}[policy]
    found = []
    for model in (single, copy.deepcopy(single).to(dtype)):
        with ParallelContext(degree=8, **options).bind(model) as pc:
            state = pc.encode(pc.options.split(text(1000)))
            found.append(pc.score(state, text(40, 1), meters=["entropy"], return_logits=True))
    exact, half = found
    assert (half.logits - exact.logits).abs().max() < 5e-2 * exact.logits.abs().max()
    assert (half.meters["entropy"] - exact.meters["entropy"]).abs().max() < 1e-2
