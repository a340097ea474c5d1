"""Fixtures, brute-force references and small random models shared by the tests of this folder."""

import json
import random
from pathlib import Path

import torch

from patches.sentinel import OPEN, PLAIN, SLOT, Sentinels, SpanLayout

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "kv_compression"
VOCABULARY = 128
ONE, TWO = Sentinels(100, (101,)), Sentinels(100, (101, 102))


def stored(name: str):
    return json.loads((FIXTURES / f"{name}.json").read_text())


LAYOUTS = {case["name"]: case for case in stored("layouts")}


def sentinels_of(case: dict) -> Sentinels:
    return Sentinels(case["open_id"], tuple(case["slot_ids"]))


def layout_of(case: dict) -> SpanLayout:
    if case["constructor"] == "from_ids":
        return SpanLayout.from_ids(torch.tensor(case["input_ids"]), sentinels_of(case))
    return SpanLayout.from_spans(case["tokens"], case["spans"], sentinels_of(case), pad_id=case["pad_id"])


def mask_of(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def random_spans(draw: random.Random, num_tokens: int, slots: int = 1) -> list[tuple[int, int]]:
    """Disjoint spans longer than the slots, adjacent ones and none included."""
    spans, start = [], draw.randrange(4)
    while start + slots + 1 <= num_tokens and len(spans) < 6:
        end = min(num_tokens, start + draw.randint(slots + 1, slots + 8))
        spans.append((start, end))
        start = end + draw.choice([0, 0, 1, 3, 7])
    return spans


def random_layout(seed: int, sentinels: Sentinels = ONE, *, batch_size: int = 3, longest: int = 40):
    """A ragged layout, its rows of tokens and its spans."""
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 100) for _ in range(draw.randint(2, longest))] for _ in range(batch_size)]
    spans = [random_spans(draw, len(row), sentinels.slots) for row in rows]
    return SpanLayout.from_spans(rows, spans, sentinels), rows, spans


def brute_force_mask(kind: list[int], span: list[int]) -> torch.Tensor:
    """The sentinel rule of one row, pair by pair."""
    size = len(kind)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        mask[query, query] = True
        for key in range(query):
            own = span[query] > 0 and span[key] == span[query]
            if kind[query] == PLAIN:
                in_context = kind[key] == PLAIN and span[key] == 0
                mask[query, key] = kind[key] == SLOT or in_context or (kind[key] == PLAIN and own)
            elif kind[query] == SLOT:
                mask[query, key] = own and kind[key] in (OPEN, PLAIN, SLOT)
    return mask
