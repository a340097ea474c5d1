"""What a `TokenWeighting` accepts, and what it says about the rest."""

import json
import math
from pathlib import Path

import pytest
import torch

from losses.token_weights import TokenWeighting, weighted_nll_sum

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "token_weighting"
TABLE = json.loads((FIXTURES / "weights.json").read_text())


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def some_losses():
    long_nll, base_nll = torch.rand(2, 3, 11, generator=seeded())
    return long_nll, base_nll, torch.rand(3, 11, generator=seeded()) < 0.7


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dense", {}, {"transforms": ("absolute",), "normalization": "L1", "interpolation": 0.75}),
        ("dense", {"interpolation": 0.5}, {"transforms": ("absolute",), "normalization": "L1", "interpolation": 0.5}),
        ("sparse", {}, {"transforms": ("absolute",), "normalization": "L1", "sparsity": 0.2}),
        ("longce", {}, {"transforms": ("minus", "exp"), "truncation": 5}),
        ("ppmi", {}, {"transforms": ("minus", "shift 1", "max"), "normalization": "L1"}),
        ("npmi", {"shift": 2.0}, {"transforms": ("shift 2", "max"), "normalization": "L1"}),
        ("ppmi", {"shift": 0.5}, {"transforms": ("minus", "shift 0.5", "max"), "normalization": "L1"}),
        ("ce", {}, {"transforms": ("absolute",), "normalization": "L1", "interpolation": 1}),
    ],
)
def test_presets(name, options, expected):
    preset = TokenWeighting.preset(name, **options)
    assert preset == TokenWeighting(**expected) and hash(preset) == hash(TokenWeighting(**expected))


def test_transforms_are_a_tuple_with_canonical_numbers():
    listed = TokenWeighting(transforms=["minus", "shift 2.0", "max"])
    assert listed.transforms == ("minus", "shift 2", "max")
    assert TokenWeighting(transforms=["shift 1e-7", "max"]).transforms == ("shift 1e-07", "max")
    assert TokenWeighting(transforms=["shift 1e-07", "max"]).transforms == ("shift 1e-07", "max")


@pytest.mark.parametrize(
    ("weighting", "needed"),
    [
        (TokenWeighting.preset("ce"), False),
        (TokenWeighting(normalization="softmax", interpolation=1), False),
        (TokenWeighting.preset("sparse", sparsity=1, zero_fill="random"), False),
        (TokenWeighting.preset("sparse", sparsity=1), True),
        (TokenWeighting(transforms=("absolute",), sparsity=1, zero_fill="random"), True),
        (TokenWeighting.preset("dense"), True),
        (TokenWeighting.preset("longce"), True),
    ],
)
def test_scores_are_needed_unless_they_cannot_matter(weighting, needed):
    assert weighting.needs_base_nll is needed
    long_nll, base_nll, valid = some_losses()
    if needed:
        with pytest.raises(ValueError, match="base_nll"):
            weighting.weights(long_nll, None, valid, seeded())
    else:
        assert torch.equal(weighting.weights(long_nll, None, valid), valid.float())
        assert torch.equal(weighting.weights(long_nll, base_nll, valid, seeded()), valid.float())


ABSOLUTE = ("absolute",)


@pytest.mark.parametrize(
    ("options", "fields"),
    [(record["kw"], record["fields"]) for record in TABLE["invalid"]]
    + [
        ({"compare": "ratio", "transforms": ABSOLUTE}, ["compare"]),
        ({"transforms": ABSOLUTE, "normalization": "L2"}, ["normalization"]),
        ({"transforms": ABSOLUTE, "zero_fill": "ones"}, ["zero_fill"]),
        ({"transforms": ABSOLUTE, "parity": "yes"}, ["parity"]),
        ({"transforms": ("square",)}, ["transforms"]),
        ({"transforms": "absolute"}, ["transforms"]),
        ({"transforms": (None,)}, ["transforms"]),
        *[({"transforms": (f"shift{x}",)}, ["transforms"]) for x in ("", " ", " -1", " 1e999", " nan", "  2", " x")],
        *[({"transforms": ABSOLUTE, "truncation": x}, ["truncation"]) for x in (0, -1.0, math.inf, "5", True)],
        *[({"transforms": ABSOLUTE, "sparsity": x}, ["sparsity"]) for x in (-0.1, 1.01, math.nan)],
        *[({"normalization": "softmax", "interpolation": x}, ["interpolation"]) for x in (-0.1, 1.1)],
        ({"transforms": ABSOLUTE, "zero_fill": "random"}, ["zero_fill", "sparsity"]),
        ({"transforms": ABSOLUTE, "sparsity": 0.5, "parity": True}, ["parity", "zero_fill"]),
        ({"transforms": ("absolute", "minus")}, ["transforms", "normalization"]),
        ({"transforms": ("exp", "shift 2")}, ["transforms", "normalization"]),
        ({"compare": "quotient", "transforms": ("minus",)}, ["transforms", "normalization"]),
        ({"sparsity": 0.2}, ["transforms", "sparsity", "normalization"]),
        (
            {"interpolation": 2, "zero_fill": "random"},
            ["interpolation", "normalization", "zero_fill", "sparsity", "transforms"],
        ),
    ],
)
def test_invalid_combinations_name_their_fields(options, fields):
    with pytest.raises(ValueError) as error:
        TokenWeighting(**options)
    assert all(field in str(error.value) for field in fields)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "softmax"},
        {"transforms": ("minus",), "normalization": "softmax"},
        {"transforms": ("absolute", "minus", "minus")},
        {"compare": "quotient", "transforms": ("minus", "minus"), "sparsity": 0.5},
        {"transforms": ("shift 2", "exp"), "truncation": 3},
    ],
)
def test_valid_combinations_are_accepted(options):
    long_nll, base_nll, valid = some_losses()
    assert bool(TokenWeighting(**options).weights(long_nll, base_nll, valid).isfinite().all())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("denser", {}, ["denser", "dense", "sparse", "longce", "ppmi", "npmi", "ce"]),
        ("dense", {"interpolate": 1}, ["interpolate"]),
        ("dense", {"shift": 2}, ["shift", "dense"]),
        ("ppmi", {"shift": 0}, ["shift"]),
        ("ppmi", {"shift": 2, "transforms": ("max",)}, ["shift"]),
    ],
)
def test_presets_refuse_what_they_do_not_have(name, options, words):
    with pytest.raises(ValueError) as error:
        TokenWeighting.preset(name, **options)
    assert all(word in str(error.value) for word in words)


LOSSES = torch.rand(2, 6, generator=seeded())
DENSE = TokenWeighting.preset("dense")
FILLED = TokenWeighting.preset("sparse", zero_fill="random")
PARITY = TokenWeighting.preset("sparse", zero_fill="random", parity=True)


@pytest.mark.parametrize(
    ("weighting", "arguments", "word"),
    [
        (DENSE, (LOSSES.bfloat16(), LOSSES), "long_nll"),
        (DENSE, (LOSSES, LOSSES.half()), "base_nll"),
        (DENSE, (LOSSES, LOSSES.view(torch.int32)), "base_nll"),
        (DENSE, (LOSSES, None), "base_nll"),
        (DENSE, (LOSSES, LOSSES[:, 1:]), "base_nll"),
        (DENSE, (LOSSES[0], LOSSES[0]), "long_nll"),
        (DENSE, (LOSSES, LOSSES, LOSSES[:1] > 0), "valid"),
        (DENSE, (LOSSES, LOSSES, LOSSES), "valid"),
        (FILLED, (LOSSES, LOSSES), "generator"),
        (FILLED, (LOSSES, LOSSES, None, [seeded()]), "generator"),
        (PARITY, (LOSSES, LOSSES, None, [seeded()] * 2), "generator"),
    ],
)
def test_bad_inputs_are_named(weighting, arguments, word):
    with pytest.raises(ValueError, match=word):
        weighting.weights(*arguments)


def test_sums_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        weighted_nll_sum(LOSSES, LOSSES[:, 1:])
