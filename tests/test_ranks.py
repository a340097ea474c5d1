"""The same global batch on 1, 2 and 4 processes, accumulated or not, is the same run: losses, gradients, validation.

The processes talk through gloo, as ``trainer=ddp trainer.accelerator=cpu trainer.devices=2`` does under torchrun.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from callbacks.loss_log import read_rows
from configuration.compose import compose
from configuration.training import run
from tests.processes import run_in_processes

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
COMMON = [
    "scale=tiny",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "sequences_per_step=4",
    "eval_every_n_steps=2",
    "export_model=false",
    "~logger.tensorboard",
]
METHODS = {
    "gca": [
        "recipe=quickstart",
        "data.path={corpus}",
        "data.context_length=128",
        "data.eval_lengths=[64,128]",
        "data.max_eval_tokens=700",
        "data.documents={documents}",
        "~callbacks.sample_text",
    ],
    "token_weighting": [
        "recipe=pg19_dense",
        "prepare.corpus={corpus}",
        "data.sequences={corpus}_96/train",
        "data.validation={corpus}_96/validation",
        "trainer.limit_val_batches=1.0",
        "module.context_length=96",
        "module.base_length=32",
        "module.base_stride=24",
        "module.position_edges=[0,32,96]",
        "~callbacks.long_perplexity",
        "~callbacks.parallel_perplexity",
    ],
    "kv_compression": [
        "recipe=wikitext2_sentinel_lora",
        "data.path={corpus}",
        "data.max_eval_blocks=5",
        "module.lora.lora_dropout=0",
        "~callbacks.compression_perplexity",
    ],
}


def options(method, corpus, output, *more, documents="stream"):
    named = [option.format(corpus=corpus, documents=documents) for option in METHODS[method]]
    return [*named, *COMMON, f"output={output}", *more]


def train(arguments):
    run(compose(arguments, command="train"))


def numbers(folder):
    """Losses, gradient norms, tokens and validation of a run."""
    rows = [(row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(folder / "train.jsonl")]
    lengths = json.loads((folder / "metrics.json").read_text())["validation"]["lengths"]
    scores = [(report["nll_sum"], report["num_targets"]) for report in lengths.values()]
    return rows, scores


def assert_same(found, expected, tolerance=1e-6):
    assert len(expected[0]) == STEPS
    for (loss, norm, tokens), (true_loss, true_norm, true_tokens) in zip(found[0], expected[0], strict=True):
        assert tokens == true_tokens
        assert loss == pytest.approx(true_loss, rel=tolerance)
        assert norm == pytest.approx(true_norm, rel=1e-4)
    for (nll, count), (true_nll, true_count) in zip(found[1], expected[1], strict=True):
        assert nll == pytest.approx(true_nll, rel=1e-6) and count == true_count


def compare(method, corpus, tmp_path, arrangements, documents="stream"):
    results = []
    for processes, batch_size, trainer in [(1, 4, "cpu"), *arrangements]:
        output = tmp_path / f"{processes}_{batch_size}_{trainer}"
        more = [f"trainer={trainer}", f"trainer.devices={processes}", f"data.batch_size={batch_size}"]
        arguments = options(method, corpus, output, *more, documents=documents)
        assert run_in_processes(processes, train, arguments) == [0] * processes
        results.append(numbers(output))
    for found in results[1:]:
        assert_same(found, results[0])


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_with_two_micro_batches_are_one_with_one(method, tiny_corpus, tmp_path):
    compare(method, tiny_corpus, tmp_path, [(2, 1, "ddp")], documents="packed")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_any_arrangement_is_the_same_run(method, tiny_corpus, tmp_path):
    arrangements = [(1, 1, "cpu"), (2, 2, "ddp"), (4, 1, "ddp"), (2, 2, "fsdp2"), (2, 1, "fsdp2")]
    compare(method, tiny_corpus, tmp_path, arrangements)


def shared_sequences(recipe, corpus, tmp_path, arrangements):
    """Runs of processes of which groups share every sequence, against one process; the shortest length is not split."""
    results = []
    for processes, batch_size, group in [(1, 4, None), *arrangements]:
        output = tmp_path / f"{processes}_{batch_size}_{group}"
        trainer = ["trainer=cpu"]
        if group:
            trainer = ["trainer=context_parallel", f"trainer.strategy.context_parallel_size={group}"]
        more = [*trainer, f"trainer.devices={processes}", f"data.batch_size={batch_size}", "data.eval_lengths=[16,128]"]
        arguments = [f"recipe={recipe}" if option == "recipe=quickstart" else option for option in METHODS["gca"]]
        arguments = [option.format(corpus=corpus, documents="stream") for option in arguments]
        arguments += [*COMMON, f"output={output}", *more]
        assert run_in_processes(processes, train, arguments) == [0] * processes
        results.append(numbers(output))
    for found in results[1:]:
        assert_same(found, results[0])


def test_two_processes_that_share_sequences_are_one(tiny_corpus, tmp_path):
    shared_sequences("quickstart", tiny_corpus, tmp_path, [(2, 2, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_sliding_window"])
def test_groups_that_share_sequences_are_one_process(recipe, tiny_corpus, tmp_path):
    shared_sequences(recipe, tiny_corpus, tmp_path, [(2, 4, 2), (4, 2, 2), (4, 1, 2), (3, 4, 3)])


def test_methods_that_need_whole_sequences_refuse_to_share_them(tiny_corpus, tmp_path):
    more = ["trainer=context_parallel", "trainer.devices=2", "data.batch_size=4"]
    arguments = options("token_weighting", tiny_corpus, tmp_path / "run", *more)
    assert run_in_processes(2, refused, arguments, "LlamaForCausalLM needs whole sequences") == [0, 0]


def refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        train(arguments)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "gca"]


@pytest.mark.parametrize("method", ["gca", *SLOW])
def test_a_run_goes_on_with_another_number_of_processes(method, tiny_corpus, tmp_path):
    """Three steps on one process; one on two, the rest on one."""
    for name, parts in {"whole": [(1, 4, 3)], "moved": [(2, 1, 1), (1, 2, 3)]}.items():
        for processes, batch_size, last in parts:
            trainer = "ddp" if processes > 1 else "cpu"
            more = [f"trainer={trainer}", f"trainer.devices={processes}", f"data.batch_size={batch_size}"]
            arguments = options(method, tiny_corpus, tmp_path / name, *more)
            # All steps are warm-up: a shorter run has the rates of a longer one.
            arguments.append(f"trainer.max_steps={last}")
            assert run_in_processes(processes, train, arguments) == [0] * processes
    assert_same(numbers(tmp_path / "moved"), numbers(tmp_path / "whole"))


@pytest.mark.slow
def test_the_command_starts_its_processes_and_nothing_warns(tiny_corpus, tmp_path):
    arguments = options("gca", tiny_corpus, tmp_path / "run", "trainer=ddp", "trainer.devices=2", "data.batch_size=2")
    arguments.append("module.optimization.warmup_steps=1")  # a longer one than the run is worth a warning
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert result.returncode == 0 and result.stderr == "", result.stderr[-3000:]
