"""Scores and what follows from them against numbers made with the published code of token weighting and LongCE."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from losses.base_scoring import score_base_nll
from losses.token_weights import TokenWeighting

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "token_weighting"
TENSORS = load_file(FIXTURES / "scoring.safetensors")
TABLE = json.loads((FIXTURES / "scoring.json").read_text())


@pytest.fixture(scope="module")
def published():
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny_llama", attn_implementation="eager")


def assert_scores(scores, expected):
    torch.testing.assert_close(scores, expected, rtol=0, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("layout", ["batched", "packed"])
@pytest.mark.parametrize("key", [key for key in TABLE if key != "longce"])
def test_published_scores(published, key, layout):
    record = TABLE[key]
    options = {name: record[name] for name in ("base_length", "base_stride", "bos_token_id")}
    options |= {"tail": record.get("tail", "align"), "layout": layout}
    ids = TENSORS[f"{key}.ids"]
    frozen = score_base_nll(published, ids, first_window=True, **options)
    assert_scores(frozen, TENSORS[f"{key}.base_frozen"])
    own = score_base_nll(published, ids, **options)
    assert_scores(own, frozen.index_fill(1, torch.arange(record["base_length"] - 1), torch.nan))
    if f"{key}.base_self" in TENSORS:
        assert_scores(own, TENSORS[f"{key}.base_self"])


MODES = [(key, case) for key, record in TABLE.items() if key != "longce" for case in record.get("cases", ())]


@pytest.mark.parametrize(("key", "case"), MODES)
def test_scored_prefix_and_weights_equal_the_published_ones(published, key, case):
    """With parity the published code overwrites the score of one more target."""
    record, ids = TABLE[key], TENSORS[f"{key}.ids"]
    mode = case.rsplit(".", 1)[1]
    options = {name: record[name] for name in ("base_length", "base_stride", "bos_token_id")}
    base_nll = score_base_nll(published, ids, first_window=mode == "frozen", **options)
    if mode == "self_parity":
        base_nll[:, record["base_length"] - 1] = torch.nan
    long_nll = score_base_nll(published, ids, base_length=ids.shape[1], base_stride=1, first_window=True)
    weighting = TokenWeighting(**record["cases"][case]["weighting"])
    weights = weighting.weights(long_nll, base_nll, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(weights, TENSORS[f"{key}.{case}.weights"], rtol=0, atol=5e-5)
    assert float((weights * long_nll).mean()) == pytest.approx(record["cases"][case]["loss"], rel=2e-5)


@pytest.mark.parametrize("case", TABLE["longce"])
def test_longce_weights_and_loss_equal_those_of_its_authors(published, case):
    record, ids = TABLE["longce"][case], TENSORS["longce.ids"]
    options = {name: record[name] for name in ("base_length", "base_stride", "tail")}
    long_nll = score_base_nll(published, ids, base_length=50, base_stride=1, first_window=True)
    weighting = TokenWeighting.preset("longce", truncation=record["truncation"])
    weights = weighting.weights(long_nll, score_base_nll(published, ids, **options))
    torch.testing.assert_close(long_nll[0], TENSORS[f"{case}.long"], rtol=0, atol=3e-5)
    torch.testing.assert_close(weights[0], TENSORS[f"{case}.weights"], rtol=0, atol=5e-5)
    assert float((weights * long_nll).mean()) == pytest.approx(record["loss"], rel=2e-5)
