"""What happens to long runs: signals, full disks, dead processes, folders in use: a sentence, and they resume."""

import io
import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from callbacks.checkpoint import newest_checkpoint, read_checkpoint
from callbacks.loss_log import LossLog, read_rows
from configuration.compose import compose
from configuration.errors import exit_with_sentence
from configuration.run_lock import only_run_in
from configuration.training import run
from datamodules.corpus import open_split
from preprocess import tokenize
from preprocess.command import run_command
from tests.processes import error_log, run_in_processes

ROOT = Path(__file__).resolve().parent.parent


def options(corpus, output, *more):
    return [
        "recipe=quickstart_sliding_window",
        "scale=tiny",
        f"data.path={corpus}",
        f"output={output}",
        "data.context_length=64",
        "data.eval_lengths=[64]",
        "data.max_eval_tokens=200",
        "sequences_per_step=2",
        "data.batch_size=1",
        "trainer.max_steps=6",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "callbacks.checkpoint.every_n_train_steps=2",
        "~callbacks.sample_text",
        "~logger.tensorboard",
        "export_model=false",
        *more,
    ]


def train(arguments):
    run(compose(arguments, command="train"))


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_rows(folder / "train.jsonl")]


def resumes_to_the_whole(corpus, broken, whole):
    train(options(corpus, broken))
    train(options(corpus, whole))
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6


def train_and_die(arguments, step, number, which=0):
    """Train; the process with this number gets the signal when it logs this step."""
    error_log(Path(next(a for a in arguments if a.startswith("output=")).removeprefix("output=")) / "errors")
    before = LossLog.on_train_batch_end

    def after(self, trainer, *rest):
        before(self, trainer, *rest)
        if trainer.global_step == step and trainer.global_rank == which:
            os.kill(os.getpid(), number)

    LossLog.on_train_batch_end = after
    train(arguments)


def test_sigterm_saves_the_step_and_the_same_command_goes_on(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    assert run_in_processes(1, train_and_die, options(tiny_corpus, folder), 3, signal.SIGTERM) == [1]
    assert "terminated at step 3; the same command resumes from checkpoint step 3" in errors(folder)
    assert newest_checkpoint(folder / "checkpoints").name == "step_3.ckpt"
    resumes_to_the_whole(tiny_corpus, folder, tmp_path / "whole")


def errors(folder, rank=0):
    return (folder / "errors" / f"{rank}.err").read_text()


def test_sigterm_to_one_process_ends_all_at_the_same_step(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]
    arguments = options(tiny_corpus, folder, *ddp)
    assert run_in_processes(2, train_and_die, arguments, 3, signal.SIGTERM, 1) == [1, 1]
    assert "terminated at step 3; the same command resumes from checkpoint step 3" in errors(folder)


def test_a_process_that_dies_ends_the_others_with_a_sentence(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]
    start = time.monotonic()
    codes = run_in_processes(2, train_and_die, options(tiny_corpus, folder, *ddp), 3, signal.SIGKILL, 1)
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - start < 200
    assert "another process of this run has died or does not answer" in errors(folder)
    resumes_to_the_whole(tiny_corpus, folder, tmp_path / "whole")


def train_on_a_small_disk(arguments, limit):
    """No file may grow beyond ``limit`` bytes, as on a disk that is nearly full."""
    error_log(Path(next(a for a in arguments if a.startswith("output=")).removeprefix("output=")) / "errors")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train(arguments)


def test_a_full_disk_during_a_checkpoint_keeps_the_one_before(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    train(options(tiny_corpus, folder, "trainer.max_steps=2"))
    size = newest_checkpoint(folder / "checkpoints").stat().st_size
    assert run_in_processes(1, train_on_a_small_disk, options(tiny_corpus, folder), size // 2) == [1]
    assert "cannot write checkpoint" in errors(folder) and "free space and resume" in errors(folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_2.ckpt"]
    resumes_to_the_whole(tiny_corpus, folder, tmp_path / "whole")


def test_any_flipped_bit_of_a_checkpoint_is_detected(tiny_corpus, tmp_path):
    train(options(tiny_corpus, tmp_path, "trainer.max_steps=1"))
    path = newest_checkpoint(tmp_path / "checkpoints")
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            # What is not a record's content: padding between records and times of their making.
            assert is_unused(whole, place), place
    path.write_bytes(whole)
    assert read_checkpoint(path)["global_step"] == 1


def is_unused(archive, place):
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        for record in opened.infolist():
            header = record.header_offset
            name, extra = (int.from_bytes(archive[header + at : header + at + 2], "little") for at in (26, 28))
            start = header + 30 + name + extra
            if start <= place < start + record.compress_size:
                return False
    return True


def hold(folder, ready, release):
    with only_run_in(Path(folder), first=True):
        ready.set()
        release.wait(60)


def test_two_runs_in_one_folder_are_refused_and_the_others_of_a_run_are_not(tiny_corpus, tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "run", ready, release))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(FileExistsError, match=rf"another run is writing to .*run \(process {holder.pid} on "):
        train(options(tiny_corpus, tmp_path / "run"))
    with only_run_in(tmp_path / "run", first=False):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with only_run_in(tmp_path / "run", first=True):
        pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tiny_corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(options(tiny_corpus, tmp_path / "file" / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "POSIX", "tr_TR.UTF-8", "tr_TR.ISO-8859-9"])
def test_strange_locales_change_nothing(locale, tiny_corpus, tmp_path):
    train(options(tiny_corpus, tmp_path / "here", "trainer.max_steps=1"))
    strange = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "3"}
    strange |= {"TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7"}
    command = [sys.executable, str(ROOT / "train.py"), *options(tiny_corpus, tmp_path / "there", "trainer.max_steps=1")]
    result = subprocess.run(command, capture_output=True, env=os.environ | strange, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "there") == losses(tmp_path / "here")


def test_text_and_names_are_read_as_utf8_in_any_locale(tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("train_\u0131.txt", "train_\u00eb.txt", "TRAIN_I.TXT"):
        (tmp_path / "text" / name).write_text(f"{name} \u20ac", encoding="utf-8")
    strange = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "-1", "TZ": "nowhere"}
    arguments = [str(tmp_path / "text"), "--tokenizer", "bytes", "--output"]
    assert run_command(tokenize.main, [*arguments, str(tmp_path / "here")]) == 0
    command = [sys.executable, "-m", "preprocess.tokenize", *arguments, str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, env=os.environ | strange, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    for split in ("train", "validation"):
        assert open_split(tmp_path / "here", split).identity == open_split(tmp_path / "there", split).identity


@pytest.mark.parametrize("ending", [lambda main: run_command(main, []), lambda main: exits(main)])
def test_an_output_without_letters_takes_escapes(ending, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert not ending(lambda arguments=None: print("\u20ac"))
    assert shown.getvalue() == b"\\u20ac\n"


def exits(main):
    with exit_with_sentence([]):
        main()


@pytest.mark.parametrize(("status", "queued"), [(143, True), (0, False), (2, False), (137, False)])
def test_the_slurm_job_queues_itself_again_after_sigterm_only(status, queued, tmp_path):
    calls = {
        "srun": f'echo "$@" > {tmp_path}/srun.txt; exit {status}',
        "scontrol": f'echo "$@" > {tmp_path}/queued.txt',
    }
    for name, body in calls.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "77"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "docs/launch/slurm.sbatch"), "recipe=pg19_gca", "output=a b"]
    assert subprocess.run(command, env=os.environ | job | path, cwd=tmp_path, check=False).returncode == status
    started = (tmp_path / "srun.txt").read_text()
    assert "trainer.num_nodes=2 trainer.devices=8 recipe=pg19_gca output=a b" in started
    assert (tmp_path / "queued.txt").exists() == queued
    if queued:
        assert (tmp_path / "queued.txt").read_text() == "requeue 77\n"


def train_with_a_clock_that_runs_back(arguments):
    ticks = itertools.count(2_000_000_000, -3600)
    time.time = lambda: float(next(ticks))
    time.time_ns = lambda: next(ticks) * 10**9
    train(arguments)


def test_a_clock_that_jumps_back_changes_nothing(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    short = options(tiny_corpus, folder, "trainer.max_steps=4")
    assert run_in_processes(1, train_with_a_clock_that_runs_back, short) == [0]
    files = sorted((folder / "checkpoints").glob("*.ckpt"))
    for age, path in enumerate(files):  # the newest step is the oldest file, and one is of the future
        os.utime(path, (4_000_000_000 - age * 3_000_000_000,) * 2)
    assert newest_checkpoint(folder / "checkpoints").name == "step_4.ckpt"
    resumes_to_the_whole(tiny_corpus, folder, tmp_path / "whole")


def test_signals_elsewhere_than_in_the_main_thread_are_left_alone(tiny_corpus, tmp_path):
    thread = threading.Thread(target=train, args=(options(tiny_corpus, tmp_path / "run", "trainer.max_steps=1"),))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before and losses(tmp_path / "run")
