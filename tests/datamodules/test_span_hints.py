"""Spans by sentences and by information: from tokens alone, the same in any batch, trainable from the recipe."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from configuration.check import check
from configuration.compose import compose
from configuration.training import run
from datamodules.corpus import open_split
from datamodules.sentinel import SentinelTextDataModule
from datamodules.sentinel_blocks import SentinelCollator
from datamodules.span_hints import SpanHints, hinted_spans
from patches.compressed_rows import sentinels_after
from patches.sentinel import PLAIN, SpanSampler, achieved_ratio
from preprocess.corpora import ensure_corpus

SENTINELS = sentinels_after(259)
DRAW = random.Random(2)
WORDS = ("".join(DRAW.choices("abcdefg", k=DRAW.randint(1, 7))) for _ in range(400))
TEXT = " ".join(word + DRAW.choice([",", ".", '!"', "\n"]) for word in WORDS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    (folder / "text").mkdir()
    for split in ("train", "validation"):
        (folder / "text" / f"{split}.txt").write_text(TEXT)
    return ensure_corpus(str(folder / "corpus"), source=str(folder / "text"), tokenizer="bytes")


def module(corpus, policy, **options):
    sampler = SpanSampler(0.4, max_length=12, policy=policy)
    sizes = {"context_length": 64, "batch_size": 2, "max_steps": 2}
    return SentinelTextDataModule(corpus, sentinels=SENTINELS, sampler=sampler, **sizes, **options)


def test_sentences_and_lines_start_after_their_ends(corpus):
    ids = torch.tensor(list(b"A b. C!\nd, e? f"))
    found = SpanHints(corpus, "train", policy="boundary")(ids, 0)
    # After each byte that is a full stop, an exclamation or question mark, or the end of a line.
    assert found == {"boundaries": [0, 4, 7, 8, 13]}
    assert SpanHints(corpus, "train", policy="uniform")(ids, 0) == {}


def test_unigrams_say_how_rare_a_token_is(corpus):
    split = open_split(corpus, "train")
    tokens = split.read(0, len(split))
    ids = torch.from_numpy(tokens[64:128])
    scores = SpanHints(corpus, "validation", policy="low_information")(ids, 1)["scores"]
    size = split.vocab_size
    wanted = [-np.log(((tokens == token).sum() + 1) / (len(tokens) + size)) for token in ids.tolist()]
    assert scores == pytest.approx(wanted)


def test_stored_scores_are_those_of_the_block(corpus, tmp_path):
    size = len(open_split(corpus, "train"))
    np.save(tmp_path / "train.npy", np.arange(size, dtype=np.float32))
    hints = SpanHints(corpus, "train", policy="low_information", scores=str(tmp_path))
    assert hints(torch.zeros(64, dtype=torch.int64), 3)["scores"] == list(range(192, 256))
    np.save(tmp_path / "train.npy", np.arange(size - 1, dtype=np.float32))
    with pytest.raises(ValueError, match=f"the split has {size} tokens"):
        SpanHints(corpus, "train", policy="low_information", scores=str(tmp_path))(torch.zeros(64), 0)
    with pytest.raises(FileNotFoundError, match=r"validation\.npy"):
        SpanHints(corpus, "validation", policy="low_information", scores=str(tmp_path))(torch.zeros(64), 0)


@pytest.mark.parametrize("policy", ["boundary", "low_information", "published"])
def test_batches_are_the_same_whatever_their_size(corpus, policy):
    one = list(module(corpus, policy).train_dataloader())
    data = module(corpus, policy)
    rows = {}
    for batch in one:
        for ids, kind, span in zip(batch["input_ids"], batch["kind"], batch["span"], strict=True):
            rows[tuple(ids[kind == PLAIN].tolist())] = span[kind == PLAIN].tolist()
            if policy != "published":
                removed = int((span[kind == PLAIN] > 0).sum()) - int(span.max())
                assert removed == int(0.4 * 64 + 0.5)
    collate = data.collator(data.sampler, data.train_split, resample=True)
    places = {tuple(data.train_blocks[index].tolist()): index for index in range(len(data.train_blocks))}
    assert len(rows) == 4
    for index in map(places.get, rows):
        batch = collate([{"input_ids": data.train_blocks[index], "index": index, "epoch": 0}])
        plain = batch["kind"][0] == PLAIN
        assert rows[tuple(batch["input_ids"][0][plain].tolist())] == batch["span"][0][plain].tolist()
    if policy == "boundary":
        starts = set(data.hints("train")(data.train_blocks[0], 0)["boundaries"])
        spans = data.spans_to_score([data.train_blocks[0]], data.sampler, "train")[0]
        begins = {start for start, _ in spans} - {end for _, end in spans}
        assert begins <= starts


def test_spans_to_score_meet_the_ratio(corpus):
    data = module(corpus, "low_information")
    blocks = [data.validation_blocks[index] for index in range(3)]
    spans = data.spans_to_score(blocks, dataclasses.replace(data.sampler, compression_ratio=0.6), "validation", seed=4)
    assert [achieved_ratio(row, 64) for row in spans] == [38 / 64] * 3
    assert hinted_spans(blocks, SpanSampler(), data.hints("validation"), slots=1, seed=0) is None


def test_refusals(corpus):
    with pytest.raises(ValueError, match="belong to policy low_information"):
        module(corpus, "boundary", span_scores="unigram")
    with pytest.raises(ValueError, match="needs hints"):
        SentinelCollator(SENTINELS, SpanSampler(policy="boundary"))
    with pytest.raises(ValueError, match="published sampler has only"):
        SentinelTextDataModule(
            corpus,
            sentinels=SENTINELS,
            sampler=SpanSampler(0.5, policy="published", protect_head=2),
            context_length=64,
        )


@pytest.mark.parametrize("policy", ["boundary", "low_information", "published"])
def test_policies_train_from_the_recipe(policy, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["recipe=wikitext2_sentinel_lora", "scale=tiny", f"data.path={corpus}", f"data.sampler.policy={policy}"]
    options += ["trainer.fast_dev_run=true", "trainer.enable_progress_bar=false", "export_model=false"]
    config = compose([*options, "callbacks.compression_perplexity.num_blocks=2"], command="train")
    check(config)
    run(config)
