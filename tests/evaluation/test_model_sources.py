"""The models of a sweep, however they are named."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.model_sources import single_model, sweep_models

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
BUILD = partial(LlamaForCausalLM, LlamaConfig(vocab_size=9, max_position_embeddings=32, **SIZES))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        BUILD().save_pretrained(path / name / "model")
    return path


def test_folders_lists_and_labels(runs):
    paths = [str(runs / name / "model") for name in ("first", "second")]
    assert [model.label for model in sweep_models(paths)] == ["first", "second"]
    assert sweep_models(paths[0])[0].limit == 32
    first, second = sweep_models({"a": paths[0], "b": paths[1]})
    assert (first.label, second.label) == ("a", "b") and first.identity != second.identity
    assert sweep_models("hub:owner/name")[0].identity == "hub:owner/name"
    assert first.load(dtype=torch.float64, device=torch.device("cpu")).dtype == torch.float64


def test_a_function_builds_the_same_model_every_time_and_draws_nothing():
    state = torch.get_rng_state()
    (one,), (two,) = sweep_models(BUILD, "a tokenizer"), sweep_models(BUILD)
    assert one.identity == two.identity and one.limit == 32 and one.label == "random"
    assert one.tokenizer == "a tokenizer" and torch.equal(state, torch.get_rng_state())


def test_refusals(runs):
    path = str(runs / "first" / "model")
    with pytest.raises(ValueError, match="has no tokenizer"):
        _ = sweep_models(path)[0].tokenizer
    with pytest.raises(ValueError, match="need different names, got first, first"):
        sweep_models([path, path])
    with pytest.raises(ValueError, match=r"model\.path is required"):
        sweep_models([])
    with pytest.raises(FileNotFoundError, match="is no model folder"):
        sweep_models(str(runs))


def test_one_model_where_one_is_asked_for(runs):
    paths = [str(runs / name / "model") for name in ("first", "second")]
    assert single_model(paths[1]).label == "second"
    with pytest.raises(ValueError, match="one model at a time, got first, second"):
        single_model(paths)
    with pytest.raises(ValueError, match=r"model\.path is required"):
        single_model(None)
