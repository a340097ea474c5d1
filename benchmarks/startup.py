"""Cases S1 and S2: what importing the project costs, and how soon a training run takes its first step."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.registry import Row, case

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
FRAMEWORKS = "torch, lightning.pytorch"
PROJECT = (
    "kernels.gca, losses.cross_entropy, models, datamodules.packed_text, lightning_modules.gca_pretraining, "
    "callbacks.validation_perplexity, callbacks.throughput, callbacks.nan_guard, callbacks.progress"
)
TURNS = 3


@cache
def _import_seconds() -> dict[str, float]:
    """Import frameworks and project in turns, each in a fresh process; return the best CPU time of each."""
    best = dict.fromkeys((FRAMEWORKS, PROJECT), float("inf"))
    for _ in range(TURNS):
        for modules in best:
            program = f"import time, {modules}; print(time.process_time())"
            command = [sys.executable, "-W", "ignore", "-c", program]
            done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
            best[modules] = min(best[modules], float(done.stdout))
    return best


@case("S1", group="startup")
def importing() -> Iterator[Row]:
    best = _import_seconds()
    yield Row("fresh process", "import, CPU s", best[PROJECT], "torch and lightning", best[FRAMEWORKS], 1.15, "lower")


@case("S2", group="startup")
def first_step() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        seconds = _first_step_seconds(Path(folder))
    limit = _import_seconds()[PROJECT] + 10
    shape = "recipe=quickstart scale=tiny, nothing prepared"
    yield Row(shape, "command to first step, CPU s", seconds, "import + 10 s", limit, 1, "lower")


def _first_step_seconds(folder: Path) -> float:
    """Start a run that prepares its corpus, stop it when the first step is logged; return its CPU time."""
    options = [f"output={folder}/run", f"prepare.source_path={folder}/data", "trainer.log_every_n_steps=1"]
    command = [sys.executable, "train.py", "recipe=quickstart", "scale=tiny", *options]
    log = folder / "run" / "train.jsonl"
    before = _children_seconds()
    child = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while child.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.02)
    if child.poll() not in (None, 0):
        raise RuntimeError(f"{' '.join(command)} failed: {child.stderr.read() if child.stderr else ''}")
    child.kill()
    child.communicate()
    return _children_seconds() - before


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
