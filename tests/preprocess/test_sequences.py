"""Stores of a run are made where they are missing, found where they are there, and refused where they do not fit."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from datamodules.score_store import ScoreStore
from datamodules.sequence_store import SequenceStore
from losses.base_scoring import score_base_nll
from preprocess.sequences import Scoring, ensure_sequences


def tiny_llama():
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))


@pytest.fixture
def paths(tmp_path):
    return {"sequences": str(tmp_path / "s" / "train"), "validation": str(tmp_path / "s" / "validation")}


def test_made_once_from_a_corpus(paths, tiny_corpus, tmp_path):
    made = ensure_sequences(**paths, length=64, corpus=tiny_corpus, max_documents=2)
    assert made == paths | {"scores": None}
    train, validation = SequenceStore(paths["sequences"]), SequenceStore(paths["validation"])
    assert train.meta["num_documents"] == 2 and train.store_id != validation.store_id
    assert (tmp_path / "s" / "tokenizer" / "tokenizer.json").is_file()
    before = (tmp_path / "s" / "train" / "tokens.npy").stat().st_mtime_ns
    ensure_sequences(**paths, length=64)
    assert (tmp_path / "s" / "train" / "tokens.npy").stat().st_mtime_ns == before


def test_scores_of_a_model_that_is_built(paths, tiny_corpus, tmp_path):
    scoring = Scoring(str(tmp_path / "scores"), tiny_llama, base_length=16, base_stride=12, dtype="float32")
    made = ensure_sequences(**paths, length=64, corpus=tiny_corpus, max_documents=1, scoring=scoring)
    store = SequenceStore(paths["sequences"])
    scores = ScoreStore(made["scores"], store)
    scorer = LlamaForCausalLM.from_pretrained(tmp_path / "scores.scorer")
    item = store[1]
    want = score_base_nll(scorer, item["input_ids"][None], base_length=16, base_stride=12, first_window=True)[0]
    assert torch.allclose(scores[1][item["valid"]], want[item["valid"]], atol=3e-5)
    torch.manual_seed(5)  # the scorer is on disk: another state changes nothing
    ensure_sequences(**paths, length=64, scoring=scoring)


def test_refusals(paths, tiny_corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocess\.chunk_documents --length 64"):
        ensure_sequences(**paths, length=64)
    ensure_sequences(**paths, length=64, corpus=tiny_corpus, max_documents=1)
    with pytest.raises(ValueError, match=r"module\.context_length=64"):
        ensure_sequences(**paths, length=32)
    with pytest.raises(FileNotFoundError, match=r"preprocess\.score_tokens"):
        ensure_sequences(**paths, length=64, scoring=Scoring(str(tmp_path / "none")))
