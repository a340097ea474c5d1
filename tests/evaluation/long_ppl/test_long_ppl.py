"""LongPPL against numbers made with its authors' code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evaluation.long_ppl import (
    EncodedText,
    encode_text,
    evaluate_long_ppl,
    find_key_intervals,
    full_context_nll,
    key_intervals,
    key_tokens,
    long_ppl_sums,
    read_key_file,
    short_context_nll,
    tokens_in_intervals,
    write_key_file,
)

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "token_weighting"
TENSORS = load_file(FIXTURES / "longppl.safetensors")
TABLE = json.loads((FIXTURES / "longppl.json").read_text())


@pytest.fixture(scope="module")
def tiny_llama():
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny_llama", attn_implementation="eager")


def published(name):
    return TENSORS[f"longppl.{name}"]


def text_of(name):
    offsets = [tuple(pair) for pair in published(f"{name}_offsets").tolist()]
    return EncodedText(published(f"{name}_ids").flatten(), offsets)


@pytest.mark.parametrize("case", TABLE)
def test_key_tokens_intervals_and_value_equal_the_published_ones(case):
    record = TABLE[case]
    long_nll, short_nll = published("evaluator_long"), TENSORS[f"{case}.short"]
    key = key_tokens(long_nll, short_nll, alpha=record["alpha"], beta=record["beta"])
    assert key.dtype == torch.bool and key.nonzero()[:, 0].tolist() == record["evaluator_key_targets"]
    intervals = key_intervals(published("evaluator_offsets"), key.nonzero()[:, 0] + 1)
    assert [list(interval) for interval in intervals] == record["intervals"]
    inside = tokens_in_intervals(published("model_offsets"), intervals)
    assert [position - 1 for position in inside] == record["model_key_targets"]
    nll = published("model_nll")
    chosen = torch.zeros_like(nll, dtype=torch.bool).index_fill(0, torch.tensor(record["model_key_targets"]).long(), 1)
    total, count = long_ppl_sums(nll.masked_fill(~chosen, float("nan")), chosen)
    assert (total.dtype, int(count)) == (torch.float32, record["num_key_tokens"])
    if record["longppl"] is not None:
        assert float((total / count).exp()) == pytest.approx(record["longppl"], rel=1e-4)


@pytest.mark.parametrize("case", TABLE)
def test_models_give_the_published_value(case, tiny_llama):
    record, evaluator = TABLE[case], text_of("evaluator")
    windows = {"context_length": record["context"], "stride": record["stride"]}
    tokens = evaluator.input_ids[None]
    torch.testing.assert_close(full_context_nll(tiny_llama, tokens)[0], published("evaluator_long"), rtol=0, atol=3e-5)
    short_nll = short_context_nll(tiny_llama, tokens, **windows)[0]
    torch.testing.assert_close(short_nll, TENSORS[f"{case}.short"], rtol=0, atol=3e-5, equal_nan=True)
    thresholds = {name: record[name] for name in ("alpha", "beta")}
    intervals = find_key_intervals(tiny_llama, evaluator, **thresholds, **windows)
    result = evaluate_long_ppl(tiny_llama, [text_of("model")], [intervals])
    assert result["num_key_tokens"] == record["num_key_tokens"]
    assert result["long_ppl"] == (record["longppl"] and pytest.approx(record["longppl"], rel=1e-4))
    assert result["ppl"] == pytest.approx(record["ppl"], rel=1e-4)
    assert result["num_targets"] == 69


def test_a_corpus_adds_sums_not_means(tiny_llama):
    whole = text_of("model")
    texts = [whole, EncodedText(whole.input_ids[:30], whole.offsets[:30]), EncodedText(whole.input_ids[:1], [(0, 1)])]
    intervals = [[(0, 1), (10, 14)], [(20, 22)], [(0, 1)]]
    result = evaluate_long_ppl(tiny_llama, texts, intervals)
    nll = published("model_nll").double()
    # Token 0 lies in the first interval and has no loss.
    key = [*nll[9:13].tolist(), *nll[19:21].tolist()]
    assert result["num_key_tokens"] == 6 and result["num_targets"] == 69 + 29
    assert result["long_ppl"] == pytest.approx(torch.tensor(key).mean().exp().item(), rel=1e-4)
    assert result["ppl"] == pytest.approx(torch.cat([nll, nll[:29]]).mean().exp().item(), rel=1e-4)
    assert [document["num_key_tokens"] for document in result["documents"]] == [4, 2, 0]
    with pytest.raises(ValueError, match="shorter"):
        evaluate_long_ppl(tiny_llama, texts, intervals[:2])


def test_key_tokens_need_gain_and_confidence_and_a_score():
    long_nll = torch.tensor([1.0, 1.0, 2.5, 1.99, 2.0, float("nan"), 1.0])
    short_nll = torch.tensor([3.5, 3.0, 9.0, 4.0, 9.0, 9.0, float("nan")])
    assert key_tokens(long_nll, short_nll).tolist() == [True, False, False, True, False, False, False]
    assert key_tokens(long_nll, short_nll, alpha=1.0, beta=-3.0).tolist() == [
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    ]


def test_touching_and_overlapping_intervals_are_merged():
    offsets = [(0, 0), (0, 3), (3, 5), (5, 5), (6, 8), (7, 9), (12, 13)]
    assert key_intervals(offsets, [2, 1, 3, 4, 5, 6]) == [(0, 5), (6, 9), (12, 13)]
    assert key_intervals(torch.tensor(offsets), torch.tensor([0, 3])) == []
    assert key_intervals(offsets, []) == []


@pytest.mark.parametrize(
    "intervals", [[(2, 6), (8, 9)], [(8, 9), (3, 4), (2, 6)], [(2, 6), (2, 3), (8, 8), (8, 9)], []]
)
def test_tokens_inside_equal_a_double_loop(intervals):
    offsets = [(0, 0), (0, 2), (2, 2), (2, 4), (3, 6), (5, 7), (6, 8), (8, 9), (9, 9), (9, 12)]
    expected = [
        position
        for position, (start, end) in enumerate(offsets)
        if start < end and any(low <= start and end <= high for low, high in intervals)
    ]
    assert tokens_in_intervals(offsets, intervals) == expected
    assert expected == ([3, 4, 7] if intervals else [])


def test_key_files_are_data(tmp_path):
    documents = [[(0, 3), (5, 9)], [], [(40349, 40350)]]
    path = tmp_path / "keys" / "evaluator.txt"
    write_key_file(path, documents)
    assert path.read_text() == "[0, 3];[5, 9]\n\n[40349, 40350]\n"
    assert read_key_file(path) == documents
    path.write_text("[1,2]; [3, 4 ]")
    assert read_key_file(path) == [[(1, 2), (3, 4)]]
    for wrong in ("[1, 2];print(1)", "[1, 2", "[1, 2, 3]", "[-1, 2]"):
        path.write_text("[1, 2]\n" + wrong)
        with pytest.raises(ValueError, match=r"evaluator.txt, line 2"):
            read_key_file(path)


def fast_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<unk>", "the", "cat", "sat"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_texts_are_encoded_with_their_offsets():
    encoded = encode_text(fast_tokenizer(), "the cat sat", max_tokens=3)
    assert encoded.input_ids.tolist() == [0, 2, 3] and encoded.offsets == [(0, 0), (0, 3), (4, 7)]
    encoded = encode_text(fast_tokenizer(), "the cat sat", special_tokens=False)
    assert encoded.input_ids.tolist() == [2, 3, 4] and encoded.input_ids.dtype == torch.int64
    with pytest.raises(ValueError, match="fast tokenizer, got object"):
        encode_text(object(), "the cat")
