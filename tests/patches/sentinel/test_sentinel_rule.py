import pytest
import torch
from sentinel_cases import LAYOUTS, ONE, TWO, brute_force_mask, layout_of, mask_of, random_layout

from patches.rules import dense_mask, sentinel


@pytest.mark.parametrize("name", LAYOUTS)
def test_stored_masks(name):
    case = LAYOUTS[name]
    layout = layout_of(case)
    mask = dense_mask(sentinel(layout), *layout.kind.shape)
    assert mask[:, 0].equal(torch.stack([mask_of(rows) for rows in case["mask"]]))


@pytest.mark.parametrize("sentinels", [ONE, TWO])
def test_the_rule_equals_loops_over_pairs(sentinels):
    for seed in range(8):
        layout, _, _ = random_layout(seed, sentinels, longest=25)
        mask = dense_mask(sentinel(layout), *layout.kind.shape)
        rows = zip(layout.kind.tolist(), layout.span.tolist(), strict=True)
        assert mask[:, 0].equal(torch.stack([brute_force_mask(kind, span) for kind, span in rows]))


def test_what_is_not_needed_is_not_seen_any_more():
    for seed in range(5):
        layout, _, _ = random_layout(seed, TWO)
        mask = dense_mask(sentinel(layout), *layout.kind.shape)[:, 0]
        for column in range(layout.kind.shape[1] - 1):
            fed = torch.arange(layout.kind.shape[1]) <= column
            later = mask[:, column + 1 :].any(1) & fed
            needed = layout.needed(column)
            assert not (later & ~needed).any()
