"""Losses of every token of a corpus: those of single windows, resumed after kills, checked, and read in training."""

import json
import math

import numpy as np
import pytest
import torch
from score_cases import save_llama
from transformers import AutoModelForCausalLM

from configuration.check import check
from configuration.compose import compose
from configuration.training import run
from datamodules.corpus import open_split
from datamodules.span_scores import open_span_scores, read_span_meta
from preprocess import span_score_job, verify
from preprocess.command import run_command
from preprocess.index import CorpusWriter
from preprocess.span_scores import main

LENGTH, STRIDE = 8, 5
OPTIONS = ["--dtype", "float32", "--device", "cpu", "--context-length", str(LENGTH), "--stride", str(STRIDE)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def write_corpus(folder, sizes=(("train", 700), ("validation", 29))):
    for split, size in sizes:
        with CorpusWriter(
            folder / split, dtype="uint16", tokenizer="t", vocab_size=61, eos_token_id=0, source=split
        ) as writer:
            writer.add(np.random.default_rng(size).integers(1, 61, size=size - 1))
    return folder


def score(corpus, model, output, *options):
    return run_command(main, [str(corpus), "--model", str(model), "--output", str(output), *OPTIONS, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, model):
    folder = tmp_path_factory.mktemp("whole") / "scores"
    assert score(corpus, model, folder) == 0
    return folder


@torch.no_grad()
def slow_scores(model_folder, tokens):
    """One forward for every token, in the window that reaches furthest: those of a piece end with it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    piece, scores = span_score_job.WINDOWS_OF_A_PIECE * STRIDE, [math.log(61)]
    for place in range(1, len(tokens)):
        begin = place // piece * piece
        end = min(begin + piece, len(tokens))
        first = max(0, begin - (LENGTH - STRIDE))
        number = max(0, -(-(place + 1 - first - LENGTH) // STRIDE))
        start = max(0, min(first + number * STRIDE, end - LENGTH))
        logits = model(torch.from_numpy(tokens[start:place])[None]).logits[0, -1].double()
        scores.append(-logits.log_softmax(-1)[tokens[place]].item())
    return scores


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_token_is_scored_in_its_window(whole, corpus, model, split):
    tokens = open_split(corpus, split)
    found = np.load(whole / f"{split}.npy")
    assert found.dtype == np.float32 and found.shape == (len(tokens),)
    np.testing.assert_allclose(found, slow_scores(model, tokens.read(0, len(tokens))), rtol=2e-5)


def test_the_same_work_is_not_done_twice_and_other_work_is_refused(whole, corpus, model, tmp_path, capsys):
    before = (whole / "meta.json").read_bytes()
    assert score(corpus, model, whole) == 0
    assert "already there" in capsys.readouterr().out
    assert score(corpus, model, whole, "--stride", "4") == 2
    assert "holds scores of another corpus, model or options" in capsys.readouterr().err
    assert (whole / "meta.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert score(corpus, model, tmp_path / "mine", "--overwrite") == 2
    assert "holds no scores" in capsys.readouterr().err
    other = tmp_path / "other"
    assert score(corpus, model, other, "--split", "validation") == 0
    assert score(corpus, model, other, "--split", "validation", "--stride", "4", "--overwrite") == 0
    assert read_span_meta(other)["work"]["stride"] == 4


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.mark.parametrize("step", range(0, 9, 2))
def test_a_kill_at_any_step_is_made_good(whole, corpus, model, tmp_path, monkeypatch, step):
    folder, calls, scored = tmp_path / "scores", [], []
    sync, piece = span_score_job.os.fsync, span_score_job.score_piece

    def kill(descriptor):
        calls.append(descriptor)
        if len(calls) > step:
            raise Killed
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(span_score_job.os, "fsync", kill)
        with pytest.raises(Killed):
            score(corpus, model, folder)
    assert not folder.exists()

    def count(model, corpus, start, *, work):
        scored.append(start)
        return piece(model, corpus, start, work=work)

    monkeypatch.setattr(span_score_job, "score_piece", count)
    assert score(corpus, model, folder) == 0
    # A piece has a sync of its scores and one of the journal; four pieces in all, then meta.json.
    assert len(scored) == 4 - min(step // 2, 4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert not list(tmp_path.glob(".*"))


def test_what_does_not_fit_is_refused(corpus, model, whole, tmp_path, capsys):
    assert score(corpus, model, tmp_path / "a", "--context-length", "65", "--stride", "5") == 2
    assert "exceed the 64 positions" in capsys.readouterr().err
    assert score(corpus, model, tmp_path / "a", "--stride", "8") == 2
    assert "stride must lie between 1 and context_length - 1 = 7" in capsys.readouterr().err
    assert score(corpus, model, tmp_path / "a", "--context-length", "1") == 2
    assert "context_length must be at least 2" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    larger = write_corpus(tmp_path / "larger", [("validation", 30)])
    meta = open_split(larger, "validation")
    with pytest.raises(ValueError, match=r"scores the corpus .*, but .* is "):
        open_span_scores(whole, meta, split="validation")
    with pytest.raises(FileNotFoundError, match=r"test\.npy: make them with python -m preprocess\.span_scores"):
        open_span_scores(whole, meta, split="test")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "validation.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="torn or no array"):
        open_span_scores(tmp_path / "bare", meta, split="validation")
    np.save(tmp_path / "bare" / "validation.npy", np.zeros(30))
    assert open_span_scores(tmp_path / "bare", meta, split="validation").shape == (30,)


def test_a_model_without_finite_losses_leaves_nothing(corpus, tmp_path, capsys):
    folder = save_llama(tmp_path / "llama")
    broken = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = torch.nan
    broken.save_pretrained(folder)
    assert score(corpus, folder, tmp_path / "scores") == 2
    message = capsys.readouterr().err
    assert f" of {corpus / 'train'}: score with --dtype float32" in message and "not finite for token" in message
    assert not (tmp_path / "scores").exists() and not list(tmp_path.glob(".*"))


def test_a_model_with_another_tokenizer_is_refused(tiny_corpus, tmp_path, capsys):
    from preprocess.tokenizers import load_tokenizer
    from preprocess.train_bpe import train_bpe

    folder = save_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    train_bpe(["some words and some more words"], vocab_size=280).save_pretrained(folder)
    assert score(tiny_corpus, folder, tmp_path / "scores") == 2
    assert "was made with another tokenizer than that of" in capsys.readouterr().err
    assert load_tokenizer(folder)


def test_training_takes_them_from_the_recipe(tiny_corpus, tmp_path, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(tmp_path / "llama")
    windows = ["--context-length", "64", "--stride", "32"]
    assert score(tiny_corpus, tmp_path / "llama", tmp_path / "scores", *windows) == 0
    assert run_command(verify.main, [str(tmp_path / "scores")]) == 0
    assert "whole, scores of tokens" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    options = ["recipe=wikitext2_sentinel_lora", "scale=tiny", f"data.path={tiny_corpus}", "export_model=false"]
    options += ["data.sampler.policy=low_information", f"data.span_scores={tmp_path / 'scores'}"]
    options += ["trainer.fast_dev_run=true", "trainer.enable_progress_bar=false"]
    config = compose([*options, "callbacks.compression_perplexity.num_blocks=2"], command="train")
    check(config)
    run(config)
