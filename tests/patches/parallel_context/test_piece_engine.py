"""The engine against one dense forward with explicit visibility, and against the untouched model."""

import pytest
import torch
from piece_models import FAMILIES, fixture, pieces_of, text, tiny_model
from piece_models import FIXTURES as FOLDER
from piece_reference import Reference, run_reference
from transformers import AutoModelForCausalLM

from patches.parallel_context import ParallelContext
from patches.parallel_context.positions import POSITION_MODES

TOLERANCE = 2e-5
SHAPES = [(3, (5, 9, 7)), (0, (6, 6)), (2, (1, 12, 4, 5))]


def score(model, prefix, pieces, query, mode="ME", **options):
    with ParallelContext(position_mode=mode, prefix=None, **options).bind(model) as pc:
        state = pc.encode(pieces, prefix=prefix)
        return pc.score(state, query, return_logits=True, meters=("entropy", "mass"))


def close(found, expected, limit=TOLERANCE):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", POSITION_MODES)
def test_one_piece_is_full_attention(family, mode):
    model = tiny_model(family, layers=2)
    prefix, piece, query = text(4, 1), text(13, 2), text(6, 3)
    expected = model(torch.tensor([prefix + piece + query])).logits[0, -6:]
    close(score(model, prefix, [piece], query, mode).logits[0], expected)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("mode", POSITION_MODES)
def test_dense_mask_all_modes(family, mode):
    for number, (prefix, lengths) in enumerate(SHAPES):
        compare_with_reference(
            tiny_model(family, layers=2), prefix, lengths, mode, micro_batch_tokens=(14, 16384)[number % 2]
        )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama", "gpt_neox")])
@pytest.mark.parametrize("mode", ["ME", "ML"])
def test_dense_mask_other_families(family, mode):
    for number, (prefix, lengths) in enumerate(SHAPES):
        compare_with_reference(
            tiny_model(family, layers=2), prefix, lengths, mode, micro_batch_tokens=(16384, 14)[number % 2]
        )


@pytest.mark.parametrize("family", ["mistral_window", "gemma3"])
@pytest.mark.parametrize("mode", ["AR", "HR", "HL", "order"])
def test_windows_measure_positions_wherever_they_are(family, mode):
    """Positions below zero, overlapping ones, and spans that only just exceed the window."""
    for prefix, lengths in ((0, (2, 9, 5)), (1, (8, 3)), (2, (1, 6))):
        compare_with_reference(tiny_model(family, layers=2), prefix, lengths, mode)


@pytest.mark.parametrize("implementation", ["grouped", "eager"])
def test_implementations_agree_with_the_definition(implementation):
    for family in ("llama", "gemma2", "mistral_window"):
        compare_with_reference(tiny_model(family), 2, (8, 3, 8), "ME", implementation=implementation)


def test_fractional_positions():
    compare_with_reference(tiny_model("llama"), 3, (5, 9, 7), "HE", fractional=True, fractional_positions=True)


def compare_with_reference(model, prefix, lengths, mode, fractional=False, **options):
    reference = Reference(text(prefix, 1), pieces_of(lengths), text(5, 9), mode)
    expected = run_reference(model, reference, fractional)
    found = score(model, reference.prefix, reference.pieces, reference.query, mode, **options)
    close(found.logits[0], expected)
    close(found.meters["entropy"][:, 0], torch.stack(reference.entropy), 5e-5)
    close(found.meters["mass"][:, 0], torch.stack(reference.mass).mean(2), 5e-5)
    nll = torch.nn.functional.cross_entropy(expected[:-1], torch.tensor(reference.query[1:]), reduction="none")
    close(found.nll[0, :-1], nll)
    assert found.nll[0, -1] == 0 and found.num_targets.tolist() == [4]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma3"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 2e-5), (torch.float32, 3e-4)])
def test_stored_models(name, dtype, limit):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32).to(dtype)
    for case in fixture(f"{name}.json"):
        with ParallelContext(degree=len(case["pieces"]), position_mode=case["mode"], prefix=None).bind(model) as pc:
            state = pc.encode(case["pieces"], prefix=case["prefix"])
            found = pc.score(state, case["query"], meters=["entropy"], return_logits=True)
            tokens = pc.generate(state, case["query"], max_new_tokens=8, eos_token_id=None).token_ids
        close(found.nll[0, :-1], torch.tensor(case["nll"], dtype=dtype), limit)
        close(found.logits[0, -1], torch.tensor(case["last_logits"], dtype=dtype), limit)
        entropy = torch.tensor(case["entropy_per_layer"], dtype=dtype)
        close(found.meters["entropy"].mean((1, 2, 3)), entropy, limit)
        assert tokens == [case["greedy"]]
