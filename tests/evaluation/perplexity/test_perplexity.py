"""evaluate_perplexity against a brute force that scores one token per forward."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.perplexity import Reading, evaluate_perplexity, evaluation_windows
from evaluation.perplexity import journal as perplexity_journal
from evaluation.perplexity import stream as perplexity
from evaluation.perplexity.journal import Journal
from evaluation.processes import Process
from models.drt import DRTConfig, DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

FIXTURE = Path(__file__).parents[2] / "fixtures" / "evaluation" / "windows.json"


def brute_force(model, tokens, window, stride, bos=None):
    """One forward per target with exactly the context its window gives it; returns {target: nll}."""
    text = window if bos is None else window - 1
    scored, start = {}, 0
    while len(scored) < len(tokens) - (bos is None):
        for target in range(start + (bos is None), min(start + text, len(tokens) - 1) + 1):
            if target in scored:
                continue
            context = ([] if bos is None else [bos]) + list(tokens[start:target])
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1].double()
            scored[target] = -float(logits.log_softmax(-1)[tokens[target]])
        start += stride
    return scored


def small_models():
    """A DRT and its window baseline on 64 token ids."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "window_size": 7}
    sizes |= {"pad_token_id": 62, "bos_token_id": 61, "eos_token_id": 61, "initializer_range": 0.3}
    retrieval = {"num_encoder_layers": 1, "num_lower_layers": 1, "layers_per_group": [1, 1]}
    chunks = {"chunk_size": 5, "chunk_top_k": 2, "landmark_token_id": 63}
    drt = DRTForCausalLM(DRTConfig(**sizes, **retrieval, **chunks))
    return drt.eval(), SlidingWindowLMForCausalLM(SlidingWindowLMConfig(num_hidden_layers=2, **sizes)).eval()


@pytest.mark.parametrize("case", json.loads(FIXTURE.read_text()), ids=str)
def test_windows_equal_the_fixture(case):
    windows = evaluation_windows(case["num_tokens"], case["window"], case["stride"])
    assert windows == [tuple(window) for window in case["windows"]]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 16, 17, 18, 50])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (16, 16), (16, 4), (16, 5), (16, 1)])
def test_every_target_comes_once_and_with_its_predecessor(num_tokens, window, stride):
    targets = []
    for start, stop, first_target in evaluation_windows(num_tokens, window, stride):
        assert start < first_target <= stop <= start + window
        targets += range(first_target, stop + 1)
    assert targets == list(range(1, num_tokens))


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("stride", [32, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_brute_force(llama, stream, bos, stride, batch_size):
    result = evaluate_perplexity(llama, stream, window=32, stride=stride, bos_token_id=bos, batch_size=batch_size)
    expected = brute_force(llama, stream.tolist(), 32, 31 if bos is not None and stride == 32 else stride, bos)
    assert result["num_targets"] == len(expected) == len(stream) - (bos is None)
    assert result["nll_sum"] == pytest.approx(math.fsum(expected.values()), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(math.fsum(expected.values()) / len(expected)), rel=1e-5)
    assert sum(result["position_counts"]) == result["num_targets"]
    assert math.fsum(result["position_nll_sum"]) == pytest.approx(result["nll_sum"], rel=1e-9)
    for start, stop, first_target, nll_sum in result["windows"]:
        assert nll_sum == pytest.approx(sum(expected[t] for t in range(first_target, stop + 1)), rel=1e-5), start


@pytest.mark.parametrize("stride", [32, 8])
def test_suite_models_equal_brute_force(stream, stride):
    drt, _ = small_models()
    tokens = stream[:70]
    result = evaluate_perplexity(drt, tokens, window=32, stride=stride, batch_size=2)
    expected = brute_force(drt, tokens.tolist(), 32, stride)
    assert result["num_targets"] == len(expected)
    assert result["nll_sum"] == pytest.approx(math.fsum(expected.values()), rel=1e-6)


@pytest.mark.parametrize("segment", [3, 13, 69])
@pytest.mark.parametrize("bos", [None, 7])
def test_segments_through_the_cache_change_nothing(llama, stream, segment, bos):
    tokens = stream[:70] % 60
    for model in (*small_models(), llama):
        for window, stride in ((69, None), (40, 30)):
            options = {"window": window, "stride": stride, "bos_token_id": bos, "batch_size": 2}
            whole = evaluate_perplexity(model, tokens, **options)
            pieces = evaluate_perplexity(model, tokens, segment_length=segment, **options)
            assert pieces["num_targets"] == whole["num_targets"]
            np.testing.assert_allclose(pieces["windows"], whole["windows"], rtol=1e-5)
            np.testing.assert_allclose(pieces["position_nll_sum"], whole["position_nll_sum"], rtol=1e-4)


def test_only_a_segment_of_logits_is_ever_there(stream):
    drt, _ = small_models()
    rows, forward = [], drt.lm_head.forward
    drt.lm_head.forward = lambda hidden: rows.append(hidden.shape[1]) or forward(hidden)
    evaluate_perplexity(drt, stream % 60, window=149, segment_length=20)
    assert max(rows) == 20 and sum(rows) == 149
    rows.clear()
    # The targets of the overlap were scored before: their logits are not computed again.
    evaluate_perplexity(drt, stream % 60, window=100, stride=60, segment_length=30)
    assert sum(rows) == 149 + 1


def test_a_journal_is_gone_on_from_and_changes_no_bit(llama, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity_journal, "FLUSH_SECONDS", 0.0)
    options = {"window": 16, "stride": 4, "batch_size": 4}
    whole = evaluate_perplexity(llama, stream, **options)
    calls, real = [], perplexity.score_windows

    def failing(*arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(perplexity, "score_windows", failing)
    with pytest.raises(KeyboardInterrupt):
        perplexity.score_stream(llama, stream, Reading(**options), journal=Journal(tmp_path))
    file = tmp_path / "rank0.jsonl"
    assert len(Journal(tmp_path).scores()) == 3
    file.write_bytes(file.read_bytes()[:-9])  # as a kill would cut it
    again = perplexity.score_stream(llama, stream, Reading(**options), journal=Journal(tmp_path))
    assert len(calls) == 4 + len(Journal(tmp_path).scores()) - 2
    assert again | {"seconds": 0} == whole | {"seconds": 0}


def test_shares_of_processes_add_up_to_the_same_bits(llama, stream, monkeypatch):
    options = {"window": 16, "stride": 4, "batch_size": 4}
    alone = evaluate_perplexity(llama, stream, **options)
    shares = []
    for rank in (2, 1, 0):
        monkeypatch.setattr(perplexity, "gather", lambda value, _: shares.append(value) or list(reversed(shares)))
        together = perplexity.score_stream(llama, stream, Reading(**options), process=Process(rank, 3, rank))
    assert sorted(len(share) for share in shares) == [3, 4, 4]
    assert together | {"seconds": 0} == alone | {"seconds": 0}


def test_batching_changes_no_sum(llama, stream):
    one, many = (evaluate_perplexity(llama, stream, window=16, stride=4, batch_size=b) for b in (1, 8))
    np.testing.assert_allclose(one["windows"], many["windows"], rtol=1e-5)
    assert one["position_counts"] == many["position_counts"]


def test_loss_by_position_is_that_of_the_position(llama, stream):
    result = evaluate_perplexity(llama, stream, window=32)
    expected = brute_force(llama, stream.tolist(), 32, 32)
    edges = result["position_edges"]
    for j, total in enumerate(result["position_nll_sum"]):
        inside = [nll for target, nll in expected.items() if edges[j] <= (target - 1) % 32 < edges[j + 1]]
        assert result["position_counts"][j] == len(inside)
        assert total == pytest.approx(sum(inside), rel=1e-5)


def test_published_mean_is_the_mean_of_window_means(llama, stream):
    result = evaluate_perplexity(llama, stream, window=32, parity="published")
    expected = []
    for start in range(0, len(stream), 32):
        window = torch.from_numpy(stream[start : start + 32])
        with torch.no_grad():
            logits = llama(window[None, :-1]).logits[0]
        expected.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    assert result["published_mean_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert result["published_mean_loss"] != pytest.approx(result["loss"], rel=1e-5)


class Corpus:
    """The surface of a token corpus on disk."""

    identity, num_bytes = "sha256:abc", 600

    def __init__(self, tokens):
        self.tokens, self.num_tokens = tokens, len(tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


def test_corpus_gives_identity_and_bits_per_byte(llama, stream):
    plain = evaluate_perplexity(llama, stream, window=32)
    result = evaluate_perplexity(llama, Corpus(stream), window=32)
    assert (result["corpus"], result["nll_sum"]) == ("sha256:abc", plain["nll_sum"])
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) / (600 / 150))
    assert plain["bits_per_byte"] is None
    assert plain["corpus"].startswith("sha256:")


def test_max_tokens_scores_the_beginning_only(llama, stream):
    cut = evaluate_perplexity(llama, Corpus(stream), window=32, max_tokens=70)
    assert cut["nll_sum"] == evaluate_perplexity(llama, stream[:70], window=32)["nll_sum"]
    assert cut["num_targets"] == 69
    assert evaluate_perplexity(llama, stream, window=32, max_windows=2)["num_targets"] == 64


def test_mode_and_gradients_are_as_before(llama, stream):
    llama.train()
    llama.model.layers[0].eval()
    evaluate_perplexity(llama, stream, window=32)
    assert llama.training
    assert not llama.model.layers[0].training
    assert torch.is_grad_enabled()
    llama.eval()


def test_autocast_dtype_is_used_and_reported(llama, stream):
    low = evaluate_perplexity(llama, stream, window=32, dtype=torch.bfloat16)
    high = evaluate_perplexity(llama, stream, window=32)
    assert (low["dtype"], high["dtype"]) == ("bfloat16", "float32")
    assert low["loss"] != high["loss"]
    assert low["loss"] == pytest.approx(high["loss"], rel=2e-2)


@pytest.mark.parametrize("bias", [2000.0])
def test_overflowing_perplexity_is_infinite(llama, stream, bias):
    class Sure(torch.nn.Linear):
        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 61)
            logits[..., 60] = bias
            return logits

    assert evaluate_perplexity(Sure(1, 1), stream, window=32)["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"window": 8, "stride": 9}, "stride must lie between 1 and"),
        ({"window": 8, "stride": 0}, "stride must lie between 1 and"),
        ({"window": 8, "batch_size": 0}, "batch_size must be at least 1"),
        ({"window": 8, "segment_length": 0}, "segment_length must be at least 1"),
        ({"window": 8, "max_tokens": 1}, "at least 2 tokens are needed"),
        ({"window": 8, "parity": "paper"}, "parity must be"),
        ({"window": 8, "stride": 4, "parity": "published"}, "windows that do not overlap"),
        ({"window": 1, "bos_token_id": 3}, "room for one more token"),
        ({"window": 8, "tokens": [1, 99]}, "vocabulary ends at 60"),
        ({"window": 8, "tokens": [[1, 2]]}, "one-dimensional integers"),
    ],
)
def test_requests_that_make_no_sense_are_explained(llama, stream, options, sentence):
    tokens = options.pop("tokens", stream)
    with pytest.raises(ValueError, match=sentence):
        evaluate_perplexity(llama, tokens, **options)
