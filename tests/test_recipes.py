"""Every recipe composes, checks, builds and takes a step at ``scale=tiny``; at full size its dry run tells its size."""

import pytest
import torch

from configuration.check import check
from configuration.compose import compose, recipe_names
from configuration.memory_trace import StepTrace
from configuration.training import describe, run
from preprocess.corpora import ensure_corpus

TRAIN = recipe_names("train")


def own_corpus(recipe, corpus, summaries):
    """Options that point a recipe at a corpus, or at documents with their summaries."""
    sections = compose([f"recipe={recipe}", "scale=tiny"], command="train")
    if "ensure_summaries" in sections["prepare"]["_target_"]:
        return [f"data.path={summaries}"]
    return [f"data.path={corpus}" if "path" in sections["data"] else f"prepare.corpus={corpus}"]


@pytest.mark.parametrize("name", TRAIN)
def test_fast_dev_run(name, tiny_corpus, summary_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = own_corpus(name, tiny_corpus, summary_folder)
    arguments = [f"recipe={name}", "scale=tiny", *places, "trainer.fast_dev_run=true"]
    config = compose([*arguments, "trainer.enable_progress_bar=false"], command="train")
    check(config)
    run(config)
    folder = tmp_path / "runs" / f"{name}_tiny"
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "model" / "tokenizer.json").is_file()


def test_tiny_takes_a_corpus_of_another_tokenizer_when_the_vocabulary_is_named(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = ensure_corpus("corpus", source=f"{tiny_corpus}/../text", tokenizer="bpe:300")
    arguments = ["recipe=books_gca", "scale=tiny", f"data.path={corpus}", "trainer.fast_dev_run=true"]
    arguments += ["trainer.enable_progress_bar=false", "export_model=false"]
    config = compose([*arguments, "vocabulary=bpe4096"], command="train")
    check(config)
    run(config)
    with pytest.raises(ValueError, match="300 token ids but the model only 259: pass vocabulary=NAME"):
        run(compose([*arguments, "output=other"], command="train"))


@pytest.mark.parametrize("landmark", [ord("e"), 256])
def test_a_landmark_that_the_text_holds_is_refused(landmark, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["recipe=books_gca", "scale=tiny", f"data.path={tiny_corpus}", f"vocabulary.landmark={landmark}"]
    with pytest.raises(ValueError, match="landmark"):
        config = compose(arguments, command="train")
        check(config)
        run(config)


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("pg19_gca", "145,980,672", "524,160"),
        ("pg19_sliding_window", "123,557,376", "524,160"),
        ("pg19_sliding_window_14", "137,716,224", "524,160"),
        ("arxiv_gca", "145,980,672", "524,160"),
        ("pg19_gca_x2", "145,981,440", "524,160"),
        ("pg19_landmark", "144,795,648", "524,160"),
        ("pg19_block_recurrent", "145,972,352", "524,160"),
        ("pg19_rpt_bm25", "145,979,904", "524,160"),
    ],
)
def test_published_sizes(name, parameters, tokens, monkeypatch):
    monkeypatch.setattr("configuration.memory.trace_module", lambda *_, **__: StepTrace(0, 0, 0, 0))
    text = describe(compose([f"recipe={name}"], command="train"))
    assert parameters in text and tokens in text


def test_quickstart_opponents_have_equal_parameters():
    sizes = []
    for name in ("quickstart", "quickstart_sliding_window"):
        with torch.device("meta"):
            from configuration.targets import build

            model = build(compose([f"recipe={name}"], command="train")["model"])()
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
