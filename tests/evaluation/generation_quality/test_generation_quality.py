"""Scores of generated texts against stored values, a library, and computations by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from evaluation.generation_quality import distinct_n, judge_perplexity, score_generations
from evaluation.generation_quality.bert_score import BertScore
from evaluation.rouge import longest_common_subsequence, rouge

STORED = json.loads((Path(__file__).parents[2] / "fixtures/kv_compression/scores.json").read_text())
TEXTS = ["the cat sat on the mat", "a dog ran", "on the mat the cat"]
REFERENCES = ["a cat sat on a mat today", "the dog ran far away", "the cat sat"]


@pytest.mark.parametrize("case", STORED["rouge_l"])
def test_stored_rouge(case):
    assert rouge([case["prediction"]], [case["reference"]])["rougeL"] == pytest.approx(case["fmeasure"], abs=1e-6)


def test_rouge_by_hand():
    found = rouge(["The cat, the CAT!", ""], ["the cat sat", "a"])
    # Unigrams clipped: the, cat of 4 and 3; bigrams: "the cat" once of 3 and 2; subsequence: the cat.
    assert found == pytest.approx({"rouge1": 2 / 7, "rouge2": 1 / 5, "rougeL": 2 / 7})
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4
    with pytest.raises(ValueError, match="one reference"):
        rouge(["a"], [])
    with pytest.raises(ValueError, match="variant is word"):
        rouge(["a"], ["a"], variant="letters")


def test_distinct_ngrams_lie_within_texts():
    assert distinct_n(["a b a b", "b a"], 1) == 2 / 6
    assert distinct_n(["a b a b", "b a"], 2) == 2 / 4
    assert distinct_n(["a b"], 3) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(["a"], 0)


def test_all_scores_together():
    scores = score_generations(
        ["a b c d a b c d", "x"],
        ["a b", "x"],
        judge=lambda texts: {"mean_text": float(len(texts))},
        bertscore=lambda one, two: [1.0, 0.5],
    )
    assert scores["rougeL"] == pytest.approx((2 * 2 / 10 + 1) / 2)
    # Of the five 4-grams of the first text one comes twice; the second text has none.
    assert scores["repetition"] == pytest.approx((1 / 5) / 2)
    assert scores["bertscore_f1"] == 0.75 and scores["judge_perplexity_mean_text"] == 2.0
    assert {f"distinct_{n}" for n in range(1, 5)} < scores.keys()


def test_a_judge_that_is_sure_of_other_tokens_finds_an_infinite_perplexity(llama, monkeypatch):
    sure = torch.full((1, 3, 61), 0.0)
    sure[..., 60] = 2000.0
    monkeypatch.setattr(llama, "forward", lambda **inputs: SimpleNamespace(logits=sure))
    found = judge_perplexity(llama, [[1, 2, 3]])
    assert found == {"mean_text": math.inf, "corpus": math.inf, "num_targets": 2}


def test_judge_perplexity_is_that_of_loops(llama):
    texts, prefixes = [[3, 9, 27, 20], [5], [7, 7, 8]], [[1, 2], [4], [6, 6, 6]]

    @torch.no_grad()
    def nll(ids, first):
        logits = llama(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [-float(logits[place - 1, ids[place]]) for place in range(first, len(ids))]

    for given in (None, prefixes):
        befores = given or [[]] * 3
        parts = [nll(b + t, max(1, len(b))) for b, t in zip(befores, texts, strict=True)]
        parts = [part for part in parts if part]
        found = judge_perplexity(llama, texts, given)
        assert found["num_targets"] == sum(map(len, parts)) == (8 if given else 5)
        assert found["mean_text"] == pytest.approx(sum(math.exp(sum(p) / len(p)) for p in parts) / len(parts), rel=1e-5)
        assert found["corpus"] == pytest.approx(math.exp(sum(map(sum, parts)) / found["num_targets"]), rel=1e-5)
    assert judge_perplexity(llama, [[5]]) == {"mean_text": None, "corpus": None, "num_targets": 0}
    with pytest.raises(ValueError, match="one prefix"):
        judge_perplexity(llama, texts, [[1]])


class Letters:
    """Words of one letter codes between two special tokens."""

    model_max_length = 32

    def __call__(self, texts, **options):
        rows = [[1, *(3 + sum(map(ord, word)) % 50 for word in text.split()), 2] for text in texts]
        width = max(map(len, rows))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = (padded != 0).long()
        return {"input_ids": padded, "attention_mask": mask, "special_tokens_mask": (padded < 3).long()}


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    return BertModel(
        BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=40, initializer_range=0.5)
    ).eval()


def by_hand(bert, layer):
    scores = []
    with torch.no_grad():
        for text, reference in zip(TEXTS, REFERENCES, strict=True):
            one, two = (
                bert(Letters()([t])["input_ids"], output_hidden_states=True).hidden_states[layer][0]
                for t in (text, reference)
            )
            cosine = torch.cosine_similarity(one[:, None], two[None], dim=-1)
            precision, recall = cosine.amax(1)[1:-1].mean(), cosine.amax(0)[1:-1].mean()
            scores.append(float(2 * precision * recall / (precision + recall)))
    return scores


@pytest.mark.parametrize("layer", [1, None])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bert_score_is_that_of_single_texts(bert, layer, batch_size):
    score = BertScore(bert, num_layers=layer, tokenizer=Letters(), batch_size=batch_size)
    assert score(TEXTS, REFERENCES) == pytest.approx(by_hand(bert, layer or -1), abs=1e-5)
    assert score(TEXTS, TEXTS) == pytest.approx([1.0] * 3, abs=1e-5)


def test_bert_score_of_a_folder_and_of_an_own_forward(bert, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS + REFERENCES for word in text.split()})
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3} | {word: 4 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(tmp_path)
    bert.save_pretrained(tmp_path)
    found = BertScore(str(tmp_path), num_layers=2)
    assert found.max_length == 16 and all(-1 <= value <= 1 for value in found(TEXTS, REFERENCES))
    assert found(TEXTS, TEXTS) == pytest.approx([1.0] * 3, abs=1e-5)
    own = BertScore(
        bert,
        tokenizer=Letters(),
        forward=lambda model, batch: model(**batch, output_hidden_states=True).hidden_states[1],
    )
    assert own(TEXTS, REFERENCES) == pytest.approx(by_hand(bert, 1), abs=1e-5)
    with pytest.raises(ValueError, match="num_layers=9"):
        BertScore(str(tmp_path), num_layers=9)
    with pytest.raises(ValueError, match="its tokenizer"):
        BertScore(bert)
    with pytest.raises(ValueError, match="at least 1"):
        BertScore(str(tmp_path), batch_size=0)
    with pytest.raises(ValueError, match="one reference"):
        found(TEXTS, [])
