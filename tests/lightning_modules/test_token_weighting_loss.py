"""The weighted loss of a batch and its gradients are the published ones; what should not matter does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_modules.token_weighting import TokenWeightedLM
from losses.base_scoring import pack_scores
from losses.token_weights import TokenWeighting

FOLDER = Path(__file__).parents[1] / "fixtures" / "token_weighting"
TABLE = json.loads((FOLDER / "scoring.json").read_text())
ARRAYS = load_file(FOLDER / "scoring.safetensors")
CASES = [
    (key, name)
    for key, entry in TABLE.items()
    if isinstance(entry, dict)
    for name, case in entry.get("cases", {}).items()
    if not case["random_fill"]
]


def make(weighting, entry, **options):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "tiny_llama", attn_implementation="eager")
    return TokenWeightedLM(
        model,
        weighting,
        base_length=entry["base_length"],
        base_stride=entry["base_stride"],
        bos_token_id=entry["bos_token_id"],
        position_edges=(0, 8, 32),
        **options,
    )


def make_batch(key, *, frozen):
    ids = ARRAYS[f"{key}.ids"]
    batch = {
        "input_ids": ids,
        "valid": torch.ones_like(ids[:, 1:], dtype=torch.bool),
        "sequence_index": torch.arange(len(ids)),
    }
    return batch | ({"base_nll_bits": pack_scores(ARRAYS[f"{key}.base_frozen"])} if frozen else {})


@pytest.mark.parametrize(("key", "name"), CASES)
def test_losses_and_gradients_of_the_fixtures(key, name):
    entry = TABLE[key]
    case = entry["cases"][name]
    frozen = name.endswith("frozen")
    module = make(case["weighting"], entry, scorer="frozen" if frozen else "self")
    loss_sum, num_targets, sums = module.loss(make_batch(key, frozen=frozen))
    loss = loss_sum / num_targets
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(case["loss"], rel=2e-5)
    assert sums["weighted_nll"].item() == pytest.approx(loss_sum.item(), rel=1e-5)
    loss.backward()
    for parameter, stored in (("lm_head.weight", "grad_lm_head"), ("model.embed_tokens.weight", "grad_embed")):
        if (want := ARRAYS.get(f"{key}.{name}.{stored}")) is not None:
            got = module.model.get_parameter(parameter).grad
            assert (got - want).norm() <= 2e-4 * want.norm()


KEY = "C32_B8_s6_bos"


@pytest.mark.parametrize(("weighting", "passes"), [("ce", 1), ("dense", 2), ("longce", 2)])
def test_scoring_takes_one_more_pass_of_the_decoder(weighting, passes):
    module = make(weighting, TABLE[KEY])
    calls = []
    module.model.model.register_forward_hook(lambda *_: calls.append(1))
    module.loss(make_batch(KEY, frozen=False))
    assert len(calls) == passes


@pytest.mark.parametrize("weighting", ["dense", "longce", {"preset": "sparse", "sparsity": 0.3}])
def test_padding_content_and_neighbours_do_not_matter(weighting):
    module = make(weighting, TABLE[KEY])
    batch = make_batch(KEY, frozen=False)
    batch["valid"][0, 20:] = False
    one = module.loss(batch)[0]
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, 21:] = 3
    assert torch.equal(module.loss(batch)[0], one)
    alone = [module.loss({name: value[i : i + 1] for name, value in batch.items()})[0] for i in range(2)]
    assert sum(alone).item() == pytest.approx(one.item(), rel=1e-6)


def test_random_filling_depends_on_the_sequence_and_the_step_alone(monkeypatch):
    module = make({"preset": "sparse", "sparsity": 0.9, "zero_fill": "random"}, TABLE[KEY])
    seen = []
    original = TokenWeighting.weights

    def spy(self, *arguments, **options):
        seen.append(original(self, *arguments, **options))
        return seen[-1]

    monkeypatch.setattr(TokenWeighting, "weights", spy)
    batch = make_batch(KEY, frozen=False)
    state = torch.get_rng_state()
    module.loss(batch)
    module.loss({name: value.flip(0) for name, value in batch.items()})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen[0], seen[1].flip(0))
    # The prefix has no scores: what is kept of it was drawn.
    assert (seen[0][:, :7] > 0).any() and (seen[0][:, :7] == 0).any()


def test_frozen_scorer_without_scores_is_refused():
    module = make("dense", TABLE[KEY], scorer="frozen")
    with pytest.raises(ValueError, match="scores"):
        module.loss(make_batch(KEY, frozen=False))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scorer": "other"}, "scorer"),
        ({"base_stride": 8, "base_length": 8}, "base_stride"),
        ({"weighting": {"sparsityy": 1}}, "sparsityy"),
        ({"weighting": "dens"}, "dens"),
        ({"lora": {"rr": 3}}, "rr"),
    ],
)
def test_refusals(options, match):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "tiny_llama")
    arguments = {"weighting": "dense", "base_length": 8, "base_stride": 6} | options
    with pytest.raises(ValueError, match=match):
        TokenWeightedLM(model, arguments.pop("weighting"), **arguments)


def test_lora_trains_adapters_only_and_starts_as_the_base():
    plain = make("dense", TABLE[KEY])
    module = make("dense", TABLE[KEY], lora={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    batch = make_batch(KEY, frozen=False)
    loss = module.loss(batch)[0]
    assert loss.item() == pytest.approx(plain.loss(batch)[0].item(), rel=1e-6)
    loss.backward()
    trained = {name for name, p in module.model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    groups = module.configure_optimizers().param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
