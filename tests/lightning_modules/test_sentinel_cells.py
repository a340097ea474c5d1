"""Cells of a sweep: trained alike, described by all that matters; the tiny recipe runs from the command."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from configuration.task import run_task
from datamodules.sentinel import SentinelTextDataModule
from lightning_modules.kv_compression import KVCompressionLM
from lightning_modules.sentinel_cells import CellTrainer, described_option
from patches.compressed_rows import sentinels_after
from patches.sentinel import SpanSampler

SENTINELS = sentinels_after(259)


def tiny_llama():
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def cells(corpus, **changes):
    module = functools.partial(KVCompressionLM, tiny_llama, sentinels=SENTINELS, learning_rate=1e-2, max_steps=3)
    data = functools.partial(SentinelTextDataModule, sentinels=SENTINELS, context_length=32, batch_size=2, max_steps=3)
    trainer = functools.partial(pl.Trainer, accelerator="cpu", max_steps=3, enable_model_summary=False)
    options = {"module": module, "data": data, "trainer": trainer, "corpus": corpus, "sampler": SpanSampler()}
    return CellTrainer(**{**options, "sentinels": SENTINELS, "eval_split": "validation"} | changes)


@pytest.mark.parametrize("method", ["sentinel", "streaming"])
def test_a_cell_is_trained_the_same_way_twice_and_leaves_the_random_state(method, tiny_corpus):
    state = torch.get_rng_state()
    one, two = (cells(tiny_corpus).train(method, 0.5, seed=1).state_dict() for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = [name for name, value in one.items() if "lora_B" in name and value.abs().max() > 0]
    assert len(changed) == 4
    other = cells(tiny_corpus).train(method, 0.5, seed=2).state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_cells_of_a_method_share_a_model_that_a_later_sweep_reads(tiny_corpus, tmp_path):
    options = {"shared_ratios": [0.5, 0.2], "models": str(tmp_path / "models")}
    first = cells(tiny_corpus, **options)
    model = first.train("local", 0.5, 1)
    assert first.train("local", 0.2, 1) is model
    assert first.train("local", 0.5, 2) is not model
    assert [file.name for file in sorted((tmp_path / "models").iterdir())] == [
        "local_1.safetensors",
        "local_2.safetensors",
    ]
    learnt = load_file(tmp_path / "models" / "local_1.safetensors")
    assert learnt and all("lora_" in name for name in learnt)
    (tmp_path / "models" / "local_2.safetensors").unlink()
    again = cells(tiny_corpus, **options)
    read, wanted = again.train("local", 0.2, 1).state_dict(), model.state_dict()
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in wanted.items())
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert not (tmp_path / "models" / "local_2.safetensors").is_file()
    with pytest.raises(ValueError, match="made with other options"):
        cells(tiny_corpus, **options, max_eval_blocks=2).train("local", 0.5, 1)
    with pytest.raises(ValueError, match="shared_ratios belong to protocol=exact"):
        cells(tiny_corpus, **options, protocol="published", text=list)
    first.train("dense", 0.0, 1)
    assert not (tmp_path / "models" / "dense_1.safetensors").is_file()
    assert first.identity() != cells(tiny_corpus).identity()


def test_identity_names_what_matters(tiny_corpus):
    base = cells(tiny_corpus)
    assert base.identity() == cells(tiny_corpus).identity()
    for change in ({"sampler": SpanSampler(max_length=9)}, {"max_eval_blocks": 2}, {"trainer": pl.Trainer}):
        assert cells(tiny_corpus, **change).identity() != base.identity()
    assert len(cells(tiny_corpus, max_eval_blocks=2).blocks()) == 2
    assert cells(lambda: tiny_corpus).identity() == base.identity()


def test_ratios_out_of_reach_are_refused_with_the_one_in_reach(tiny_corpus):
    found = cells(tiny_corpus)
    found.check("sentinel", 0.9)
    found.check("local", 0.99)
    with pytest.raises(ValueError, match=r"remove at most 0\.9375; lower it, or raise sampler\.max_length"):
        found.check("sentinel", 0.97)


def test_a_model_folder_is_described_by_its_content(tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path)
    first = described_option(functools.partial(len, path=str(tmp_path)))
    assert first["path"].startswith("sha256:")
    tiny_llama().save_pretrained(tmp_path)
    assert described_option(functools.partial(len, path=str(tmp_path))) != first
    assert described_option([LlamaConfig(hidden_size=32), (1, None)])[0]["hidden_size"] == 32


def test_the_tiny_sweep_from_the_command(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["recipe=wikitext2_compression_sweep", "scale=tiny", f"data.path={tiny_corpus}", "trainer.max_steps=1"]
    arguments += ["output_dir=out", "sweep.ratios=[0.0,0.5]", "sweep.methods=[sentinel,local]"]
    result = run_task(arguments, lambda line: None, command="eval")
    assert [row["method"] for row in result["results"]] == ["dense", "sentinel", "local"]
    assert {row["num_targets"] for row in result["results"]} == {result["results"][0]["num_targets"]}
    assert (tmp_path / "out" / "cells" / "sentinel_0.5_0.json").is_file()
    assert run_task([*arguments, "trainer.max_steps=1", "dry_run=true"], lambda line: None, command="eval") is None
    with pytest.raises(ValueError, match="made with other options"):
        run_task([*arguments[:3], "trainer.max_steps=2", *arguments[4:]], lambda line: None, command="eval")


def test_the_published_protocol_from_the_command(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["recipe=wikitext2_compression_sweep", "scale=tiny", f"data.path={tiny_corpus}", "trainer.max_steps=1"]
    arguments += ["output_dir=out", "sweep.ratios=[0.0,0.5]", "sweep.methods=[sentinel,local,scattered]"]
    arguments += ["sweep.max_eval_blocks=4"]
    with pytest.raises(ValueError, match=r"pass sweep\.text=FOLDER"):
        run_task([*arguments, "sweep.protocol=published"], lambda line: None, command="eval")
    arguments += ["sweep.protocol=published", f"sweep.text={tiny_corpus}/../text"]
    result = run_task(arguments, lambda line: None, command="eval")
    dense, marked, *baselines = result["results"]
    assert 0.2 < marked["true_ratio_words"] < 0.5 and marked["extra_tokens"] == marked["num_sentinels"] > 0
    for row in (dense, *baselines):
        assert row["extra_tokens"] == row["true_ratio_words"] == 0
    assert all(row["perplexity_original"] > 1 and row["perplexity"] > 1 for row in result["results"])
    assert "true_ratio_words" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(ValueError, match="made with other options"):
        run_task([*arguments, "sweep.protocol=exact"], lambda line: None, command="eval")
