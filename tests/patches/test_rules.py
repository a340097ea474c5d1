import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers.masking_utils import sdpa_mask

from patches.rules import (
    causal,
    dense_mask,
    documents,
    index_mask,
    intersect,
    local,
    scattered,
    scattered_keep,
    sentinel,
    streaming,
)

STORED = json.loads((Path(__file__).parents[1] / "fixtures" / "kv_compression" / "rules.json").read_text())


@dataclass
class Columns:
    kind: torch.Tensor
    span: torch.Tensor


def matrix(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def columns() -> Columns:
    draw = torch.Generator().manual_seed(3)
    kind = torch.randint(-1, 3, (2, 37), generator=draw).to(torch.int8)
    return Columns(kind, torch.randint(0, 4, (2, 37), generator=draw).int())


RULES = {
    "causal": causal,
    "sentinel": lambda: sentinel(columns()),
    "local": lambda: local(0.7),
    "scattered": lambda: scattered(torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) < 0.5),
    "shared keep": lambda: scattered(torch.rand(37, generator=torch.Generator().manual_seed(1)) < 0.5),
    "streaming": lambda: streaming(3, 6),
    "documents": lambda: intersect(causal(), documents(torch.arange(37).div(11, rounding_mode="floor").expand(2, 37))),
}


@pytest.mark.parametrize("name", RULES)
def test_one_object_serves_all_three_uses(name):
    rule = RULES[name]()
    mask = dense_mask(rule, 2, 37)
    assert mask.shape == (2, 1, 37, 37) and mask.dtype == torch.bool
    assert not mask.triu(1).any() and mask.diagonal(dim1=-2, dim2=-1).all()
    assert mask.sum() < dense_mask(causal(), 2, 37).sum() or name == "causal"
    batch, query, key = torch.arange(2)[:, None, None, None], torch.arange(37)[:, None], torch.arange(37)
    assert rule(batch, torch.zeros(1, 1, 1, 1).long(), query, key).expand_as(mask).equal(mask)
    assert create_mask(rule, 2, 1, 37, 37, device="cpu").equal(mask)
    for use_vmap in (False, True):
        options = {"allow_is_causal_skip": False, "use_vmap": use_vmap}
        assert sdpa_mask(2, 37, 37, mask_function=rule, **options).equal(mask)


@pytest.mark.parametrize("case", STORED["local"], ids=lambda case: str(case["compression_ratio"]))
def test_local_masks(case):
    mask = dense_mask(local(case["compression_ratio"]), 1, case["num_tokens"])
    assert mask[0, 0].equal(matrix(case["mask"]))


@pytest.mark.parametrize("case", STORED["local_first_visible"], ids=lambda case: str(case["compression_ratio"]))
def test_local_lower_bounds_are_exact(case):
    query = torch.tensor([case["query"]])
    mask = index_mask(local(case["compression_ratio"]), query, torch.arange(32768)[None])
    assert mask[0, 0].int().argmax(-1).tolist() == case["first_visible"]
    assert mask[0, 0].sum(-1).tolist() == [
        q - first + 1 for q, first in zip(case["query"], case["first_visible"], strict=True)
    ]


def test_scattered_and_streaming_masks():
    for case in STORED["scattered"]:
        keep = torch.tensor(case["keep"]).bool()
        wanted = torch.stack([matrix(rows) for rows in case["mask"]])
        assert dense_mask(scattered(keep), 3, 40)[:, 0].equal(wanted)
        assert dense_mask(scattered(keep[1]), 1, 40)[0, 0].equal(wanted[1])
    for case in STORED["streaming"]:
        mask = dense_mask(streaming(case["num_sinks"], case["window_size"]), 1, case["num_tokens"])
        assert mask[0, 0].equal(matrix(case["mask"]))


def test_index_masks_pick_rows_and_columns_and_hide_holes():
    rule = sentinel(columns())
    mask = dense_mask(rule, 2, 37)
    query, key = torch.tensor([[30, -1, 36], [12, 5, 29]]), torch.tensor([[-1, 0, 7, 30, 36], [3, -1, 29, 12, -1]])
    chosen = index_mask(rule, query, key)
    for row in range(2):
        for i, q in enumerate(query[row].tolist()):
            for j, k in enumerate(key[row].tolist()):
                assert chosen[row, 0, i, j] == (q >= 0 and k >= 0 and bool(mask[row, 0, q, k]))


def test_exact_draws_keep_the_same_number_in_every_row():
    for ratio in (0.0, 0.1, 0.5, 0.83):
        keep = scattered_keep(5, 60, ratio, generator=torch.Generator().manual_seed(2))
        assert keep.sum(1).tolist() == [int((1 - ratio) * 60 + 0.5)] * 5
    assert len({tuple(row) for row in keep.tolist()}) == 5
    again = scattered_keep(5, 60, 0.83, generator=torch.Generator().manual_seed(2))
    assert again.equal(keep)
    plain = scattered_keep(2, 60, 0.5, generator=random.Random(1))
    assert plain.equal(scattered_keep(2, 60, 0.5, generator=random.Random(1)))


def test_exact_draws_are_uniform_and_protect_the_head():
    keep = scattered_keep(4000, 20, 0.5, generator=torch.Generator().manual_seed(0))
    assert (keep.float().mean(0) - 0.5).abs().max() < 0.04
    keep = scattered_keep(4000, 20, 0.5, generator=torch.Generator().manual_seed(0), protect_head=4)
    assert keep[:, :4].all() and keep.sum(1).eq(10).all()
    assert (keep[:, 4:].float().mean(0) - 6 / 16).abs().max() < 0.04


def test_published_draws_are_independent():
    keep = scattered_keep(4000, 20, 0.3, generator=torch.Generator().manual_seed(0), exact=False)
    assert (keep.float().mean(0) - 0.7).abs().max() < 0.04
    assert keep.sum(1).unique().numel() > 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: local(1.0), "fraction removed"),
        (lambda: local(-0.1), "fraction removed"),
        (lambda: scattered(torch.ones(4)), "bool"),
        (lambda: streaming(-1, 4), "num_sinks"),
        (lambda: streaming(2, 0), "window_size"),
        (intersect, "at least one"),
        (lambda: scattered_keep(1, 10, 0.8, generator=torch.Generator(), protect_head=3), "protected"),
        (lambda: scattered_keep(1, 10, 1.0, generator=torch.Generator()), "fraction removed"),
    ],
)
def test_impossible_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
