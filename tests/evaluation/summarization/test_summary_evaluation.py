"""Generated summaries: batches equal single prompts, killed and shared evaluations write the same; scores, errors."""

import contextlib
import json

import pytest
import torch

from datamodules.summary_store import open_summaries
from evaluation.processes import Process
from evaluation.rouge import NAMES, rouge
from evaluation.summarization import task as summarization
from evaluation.summarization.decoding import Decoding, generate_batch
from evaluation.summarization.task import SummarizationTask
from models.drt import DRTConfig, DRTForCausalLM
from preprocess.tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def fixed_commit(monkeypatch):
    """Somebody may commit while these tests run."""
    monkeypatch.setattr("evaluation.arithmetic.git_commit", lambda: "a commit")


@pytest.fixture(scope="module")
def drt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_encoder_layers": 1}
    layers = {"num_lower_layers": 1, "layers_per_group": [1], "chunk_size": 7, "chunk_top_k": 2, "window_size": 9}
    ids = {"landmark_token_id": 258, "pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 256}
    return DRTForCausalLM(DRTConfig(vocab_size=262, initializer_range=0.4, **sizes, **layers, **ids)).eval()


@pytest.fixture(scope="module")
def model_folder(drt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    drt.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def task(model_folder, summary_folder, **options):
    pairs = open_summaries(summary_folder, split="test")
    fine = {"max_length": 96, "max_new_tokens": 10, "batch_size": 4, "progress": False}
    return SummarizationTask(model_folder, pairs, **(fine | options))


def test_a_batch_is_what_its_prompts_get_alone(drt, summary_folder):
    store = open_summaries(summary_folder, split="test")
    options = {"max_length": 200, "max_new_tokens": 12, "chunk_size": 7, "alignment": "pad", "pad_token_id": 257}
    prompts = store.prompts(6, **options)
    assert len({len(prompt) for prompt in prompts}) > 2
    decoding, forbidden = Decoding(12), [257, 258, 259, 260, 261]
    together = generate_batch(drt, prompts, decoding, number=0, eos_token_id=256, forbidden=forbidden)
    for prompt, expected in zip(prompts, together, strict=True):
        ids = torch.from_numpy(prompt)[None]
        for token in expected:  # without a cache, without a batch
            with torch.no_grad():
                logits = drt(ids, use_cache=False).logits[0, -1]
            logits[forbidden] = -torch.inf
            assert int(logits.argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_summaries_end_with_the_end_of_text(drt):
    class Scripted(torch.nn.Linear):
        def generate(self, ids, attention_mask, **options):
            assert attention_mask.tolist() == [[0, 1], [1, 1]] and ids[:, 1].tolist() == [3, 5]
            return torch.cat([ids, torch.tensor([[7, 9, 9], [7, 8, 6]])], dim=1)

    prompts = [torch.tensor([3]).numpy(), torch.tensor([4, 5]).numpy()]
    assert generate_batch(Scripted(1, 1), prompts, Decoding(3), number=0, eos_token_id=9) == [[7, 9], [7, 8, 6]]


def test_metrics_are_those_of_the_predictions(model_folder, summary_folder, tmp_path):
    result = task(model_folder, summary_folder, parity="published").run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    store = open_summaries(summary_folder, split="test")
    assert [row["reference"] for row in rows] == [text["summary"] for text in store.texts()]
    assert [row["index"] for row in rows] == list(range(6))
    expected = rouge([row["prediction"] for row in rows], [row["reference"] for row in rows])
    stored = json.loads((tmp_path / "metrics.json").read_text())
    for name in NAMES:
        assert stored["results"][name] == pytest.approx(expected[name])
        mean = sum(row[f"{name}_published_bpe"] for row in rows) / 6
        assert stored["results"][f"{name}_published_bpe"] == pytest.approx(mean)
    protocol = stored["protocol"]
    assert (protocol["alignment"], protocol["chunk_size"], protocol["stemmer"]) == ("pad", 7, False)
    assert all(0 < row["new_tokens"] <= 10 for row in rows)
    assert result["table"].splitlines()[0].split()[:5] == ["model", "num_pairs", *NAMES]


def test_a_killed_evaluation_goes_on_and_writes_the_same(model_folder, summary_folder, tmp_path, monkeypatch):
    options = {"temperature": 1.0, "top_k": 5, "batch_size": 2}
    task(model_folder, summary_folder, **options).run(tmp_path / "whole")
    real, calls = summarization.generate_batch, []

    def stopping(*arguments, **named):
        calls.append(named["number"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(summarization, "generate_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        task(model_folder, summary_folder, **options).run(tmp_path / "cut")
    (file,) = (tmp_path / "cut" / "generated").glob("*/rank0.jsonl")
    file.write_bytes(file.read_bytes()[:-5])  # the second batch lost its last line
    task(model_folder, summary_folder, **options).run(tmp_path / "cut")
    assert calls == [0, 1, 2, 1, 2]
    files = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    monkeypatch.setattr(summarization, "load_model", None)  # nothing is left to load a model for
    task(model_folder, summary_folder, **options, stemmer=True).run(tmp_path / "cut")


def test_processes_share_the_batches(model_folder, summary_folder, tmp_path, monkeypatch):
    task(model_folder, summary_folder, batch_size=2).run(tmp_path / "alone")
    monkeypatch.setattr(summarization, "joined", lambda process: contextlib.nullcontext())
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    for rank in (1, 0):
        monkeypatch.setattr(Process, "current", classmethod(lambda cls, rank=rank: cls(rank, 2, rank)))
        result = task(model_folder, summary_folder, batch_size=2).run(tmp_path / "shared")
        assert (result is None) == (rank == 1)
    files = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("alone", "shared")]
    assert files[0] == files[1]
    assert len(list((tmp_path / "shared" / "generated").glob("*/rank*.jsonl"))) == 2


def test_models_without_chunks(llama_folder, summary_folder, tmp_path):
    result = task(llama_folder, summary_folder, max_pairs=2).run(tmp_path)
    assert result["protocol"]["alignment"] == "none" and result["results"]["num_pairs"] == 2
    with pytest.raises(ValueError, match="needs the chunk_size"):
        task(llama_folder, summary_folder, alignment="pad").run(tmp_path)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, eos_token_id=256, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_pairs": 0}, "max_pairs must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens and top_k must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_k": 2}, "top_k=2 has no effect at temperature 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"parity": "paper"}, "parity is published or null"),
        ({"dtype": "float8"}, "dtype is one of"),
        ({"alignment": "left"}, "alignment is one of"),
        ({"max_length": 18}, "the marker alone needs 15"),
    ],
)
def test_options_out_of_range_are_explained(model_folder, summary_folder, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(model_folder, summary_folder, **options).run(tmp_path)


def test_missing_models_and_other_tokenizers_are_explained(model_folder, summary_folder, tmp_path, drt):
    with pytest.raises(FileNotFoundError, match="nowhere is no model folder"):
        task("nowhere", summary_folder)
    drt.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="another tokenizer than the model's: make them with"):
        task(str(tmp_path / "bare"), summary_folder).run(tmp_path / "out")
