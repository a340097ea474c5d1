"""Every evaluation by 1, 2 and 3 processes, and killed in the middle: metrics, rows and predictions are the same."""

import contextlib
import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from byte_llama import tiny_llama
from matplotlib.figure import Figure

import eval as command
from configuration.errors import ConfigError
from evaluation import arithmetic
from evaluation.perplexity import journal
from models.drt import DRTConfig, DRTForCausalLM
from preprocess.tokenizers import byte_tokenizer
from tests.processes import error_log, run_in_processes

COSTS = ("second", "peak_bytes", "peak_mem", "processes")
SWEEP = "wikitext2_compression_sweep"  # it trains, in one process
EVALUATIONS = ("perplexity", "passkey", "ruler", "ppl_parallel", "long_ppl", "compression_generation", "summarization")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models that read bytes: a Llama and a DRT."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny_llama(1024).save_pretrained(folder / "llama")
    sizes = {"vocab_size": 259, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "window_size": 9}
    layers = {"num_lower_layers": 1, "layers_per_group": [1], "num_encoder_layers": 1, "chunk_top_k": 2}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257, "landmark_token_id": 258}
    config = DRTConfig(**sizes, **layers, **ids, chunk_size=16, initializer_range=0.5)
    DRTForCausalLM(config).save_pretrained(folder / "drt")
    for name in ("llama", "drt"):
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def arguments(models, tiny_corpus, summary_folder):
    """The command line of each evaluation but for its output."""
    llama, drt = f"model.path={models / 'llama'}", f"model.path={models / 'drt'}"
    text = Path(tiny_corpus).parent / "text"
    return {
        "perplexity": [llama, f"data.path={tiny_corpus}", "task.lengths=[32,64]", "task.max_tokens=700"]
        + ["task.batch_tokens=128"],
        "passkey": [drt, f"data.path={tiny_corpus}", "task.lengths=[160,330]", "task.depths=[0.0,1.0]"]
        + ["task.num_samples=2", "task.needles.key_length=3"],
        "ruler": [llama, "tasks=[passkey]", "lengths=[400,500]", "data.num_examples=4", "task.max_new_tokens=4"],
        "ppl_parallel": [llama, f"data.path={text / 'train_02.txt'}", "data.name=text", "lengths=[120]"]
        + ["degrees=[1,3]", "prefixes=[p2]", "selections=[none]", "keep_tail=8", "task.batch_tokens=240"],
        "long_ppl": [llama, f"data.text={text}", f"task.evaluator={models / 'llama'}", "task.max_tokens=60"]
        + ["task.context_length=8", "task.stride=4", "task.alpha=0.01", "task.beta=-9.0", "task.max_documents=5"],
        "compression_generation": [llama, f"data.source={text}", "sweep.ratios=[0.0,0.5]", "sweep.methods=[local]"]
        + ["task.prefixes.prefix_words=6", "task.prefixes.reference_words=3", "task.prefixes.max_prefixes=4"]
        + ["task.sampling.num_samples=2", "task.sampling.words=2", "task.sampling.max_new_tokens=9"]
        + [f"task.judge={models / 'llama'}"],
        SWEEP: [
            "scale=tiny",
            f"data.path={tiny_corpus}",
            "prepare.source=null",
            "sweep.ratios=[0.0,0.5]",
            "sweep.methods=[local]",
        ]
        + ["trainer.max_steps=2", "sweep.max_eval_blocks=4"],
        "summarization": [drt, f"data.path={summary_folder}", "data.split=test", "task.max_length=96"]
        + ["task.max_new_tokens=6", "task.batch_size=2"],
    }


def evaluate(name, arguments, output, fatal_write=None):
    """Run the command; with ``fatal_write`` the process ends, as by SIGKILL, at that write to the disk."""
    arithmetic.git_commit = lambda: "a commit"  # somebody may commit while this runs
    journal.FLUSH_SECONDS = 0.0  # every batch
    Figure.savefig = lambda *_, **options: None  # figures take longer than everything else
    writes, real = [], os.fsync

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) == fatal_write:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
    error_log(output / "errors")
    with (output / "printed.txt").open("a") as printed, contextlib.redirect_stdout(printed):
        device = [] if name == SWEEP else ["task.device=cpu"]
        command.main([f"recipe={name}", *arguments, f"output={output}", *device])
    (output / "errors" / f"{os.environ.get('RANK', 0)}.writes").write_text(str(len(writes)))


def numbers(output):
    """Return metrics, rows and predictions without what took how long by how many."""
    found = {"metrics": plain(json.loads((output / "metrics.json").read_text()))}
    for file in output.rglob("predictions.jsonl"):
        found[str(file.relative_to(output))] = [plain(json.loads(line)) for line in file.read_text().splitlines()]
    for file in output.glob("*.csv"):
        with file.open(newline="") as rows:
            found[file.name] = [plain(row) for row in csv.DictReader(rows)]
    return found


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not any(word in key for word in COSTS)}
    return [plain(item) for item in value] if isinstance(value, list) else value


def imported(name, arguments):
    """Import all that an evaluation needs once, not in every process."""
    command.main([f"recipe={name}", *arguments, "dry_run=true"])
    return arguments


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in EVALUATIONS[1:]]


@pytest.mark.parametrize("name", [EVALUATIONS[0], *SLOW])
def test_any_number_of_processes(name, arguments, tmp_path):
    options, found = imported(name, arguments[name]), {}
    for count in (1, 2, 3):
        output = tmp_path / str(count)
        assert run_in_processes(count, evaluate, name, options, output) == [0] * count
        found[count] = numbers(output)
        writes = [int((output / "errors" / f"{rank}.writes").read_text()) for rank in range(count)]
        # A process takes whole settings of the sweep, and may come too late for any.
        assert min(writes) > 0 or name == "ppl_parallel"
        found[count]["lines printed"] = len((output / "printed.txt").read_text().splitlines())
    assert len(found[1]) > 1 and found[1] == found[2] == found[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EVALUATIONS, SWEEP])
def test_killed_in_the_middle(name, arguments, tmp_path):
    options, whole, killed = imported(name, arguments[name]), tmp_path / "whole", tmp_path / "killed"
    assert run_in_processes(1, evaluate, name, options, whole) == [0]
    for write in (5, 3):  # of the settings' files, then of answers
        assert run_in_processes(1, evaluate, name, options, killed, write) == [-signal.SIGKILL]
        assert not (killed / "metrics.json").exists()
    count = 1 if name == SWEEP else 2
    assert run_in_processes(count, evaluate, name, options, killed) == [0] * count
    assert numbers(killed) == numbers(whole)


def test_what_trains_is_refused_in_several_processes(monkeypatch, arguments, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"recipe={SWEEP} works in one process, 2 were started: leave torchrun out"):
        command.main([f"recipe={SWEEP}", *arguments[SWEEP], f"output={tmp_path}"])
    assert not list(tmp_path.iterdir())
