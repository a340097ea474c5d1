"""Cases C1 to C3: one sequence over processes on a CPU: what they send, what each of them holds, how long it takes.

Every process computes the step of its part on one thread; a case is refused unless logits and summed gradients are
those of one process. Time is that of the processor: what idle cores would do at best, whatever else a machine runs.
"""

import functools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import allocations
from benchmarks.registry import Row, case
from kernels.context_parallel import SequenceGroup, SequencePart
from losses.cross_entropy import next_token_nll
from models.drt import DRTConfig, DRTForCausalLM

LENGTH, TURNS = 8190, 3
SHAPE = f"{LENGTH} tokens, width 128, 2 + 2 layers, window 512, chunks of 63"


def build() -> DRTForCausalLM:
    """Build the model of all cases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_encoder_layers": 1}
    retrieval = {"num_lower_layers": 2, "layers_per_group": [2], "chunk_size": 63, "chunk_top_k": 8}
    ids = {"vocab_size": 512, "landmark_token_id": 511, "pad_token_id": 510, "bos_token_id": 509, "eos_token_id": 509}
    return DRTForCausalLM(DRTConfig(window_size=512, **sizes, **retrieval, **ids)).train()


def tokens() -> torch.Tensor:
    """Return the sequence of all cases ``[1, T]``."""
    return torch.randint(500, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def step(model: Any, part: SequencePart | None) -> torch.Tensor:
    """Run forward and backward of a part (None: of everything); return the logits ``[1, L, V]``."""
    model.zero_grad()
    ids = tokens()
    start, stop = (0, LENGTH) if part is None else (part.start, part.stop)
    following = ids[:, stop] if stop < LENGTH else None
    options = {"use_cache": False} if part is None else {"part": part}
    logits = model(input_ids=ids[:, start:stop], retrieval_generator=torch.tensor([3]), **options).logits
    next_token_nll(logits, ids[:, start:stop], next_token=following)[0].sum().backward()
    return logits.detach()


@dataclass(frozen=True)
class Measured:
    """What one process found, or the only one."""

    received: int
    peak: int
    seconds: float


def expected_bytes(config: DRTConfig, part: SequencePart) -> int:
    """Count what a process gets in a step: chunks and windows and a retrieval forward, their gradients backward.

    With n chunks in a part and W parts, part r gets (W - 1) max(n) chunks and sends gradients for none of the later
    ones: n_r (W - 1 - r) come back. A chunk is a landmark and S keys and values; all numbers are float32.
    """
    rank, size, counts = part.group.rank, part.group.size, part.units(config.chunk_size)
    chunk = config.hidden_size + 2 * config.chunk_size * config.chunk_num_kv_heads * config.head_dim
    window = (config.window_size - 1) * 2 * config.num_kv_heads * config.head_dim * config.num_hidden_layers
    retrieval = len(config.layers_per_group) * config.chunk_top_k
    forward = (size - 1) * max(counts) * chunk + (rank > 0) * (window + 2 * retrieval)
    backward = (size - 1 - rank) * counts[rank] * chunk + (rank < size - 1) * (window + retrieval)
    return 4 * (forward + backward)


def measure(part: SequencePart | None) -> tuple[Measured, torch.Tensor, Any]:
    """Take bytes, peak memory and CPU time of a step; return logits and model, too."""
    model = build()
    logits = step(model, part)
    received = 0 if part is None else part.group.received_bytes
    seconds = float("inf")
    for _ in range(TURNS):
        start = time.process_time()
        step(model, part)
        seconds = min(seconds, time.process_time() - start)
    peak, _ = allocations(lambda: step(model, part))
    return Measured(received, peak, seconds), logits, model


def work(rank: int, num_processes: int, folder: str) -> None:
    """Measure one process; the first writes what all have found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_processes)
    assert dist.group.WORLD is not None
    part = None
    if num_processes > 1:
        group = SequenceGroup(list(range(num_processes)), rank, dist.group.WORLD)
        part = group.part(LENGTH, build().sequence_cut)
    measured, logits, model = measure(part)
    if part is not None and measured.received != expected_bytes(model.config, part):
        raise ArithmeticError(f"got {measured.received} bytes, expected {expected_bytes(model.config, part)}")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    found: list[Any] = [None] * num_processes
    dist.all_gather_object(found, (measured, logits))
    if rank == 0:
        whole = torch.cat([part for _, part in found], dim=1)
        result = ([each for each, _ in found], {"logits": whole} | gradients)
        torch.save(result, f"{folder}/{num_processes}.pt")
    dist.barrier()


@functools.cache
def processes(num_processes: int) -> tuple[list[Measured], dict[str, torch.Tensor]]:
    """Return what each of some processes measured, and logits and gradients of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (num_processes, folder), nprocs=num_processes)
        result = torch.load(Path(folder) / f"{num_processes}.pt", weights_only=False)
    return result


def compared(num_processes: int) -> tuple[Measured, list[Measured]]:
    """Measure one process and several; refuse results that differ."""
    (alone,), expected = processes(1)
    several, found = processes(num_processes)
    for name, reference in expected.items():
        error = (found[name] - reference).norm() / reference.norm()
        if not error <= 1e-5:
            raise ArithmeticError(f"{name} is wrong on {num_processes} processes: relative error {error:.2e}")
    return alone, several


def every_layer(num_processes: int) -> float:
    """Count what full attention of as many layers would get: keys and values of every other part, and gradients."""
    config = build().config
    kv = 2 * config.num_kv_heads * config.head_dim * LENGTH / num_processes
    return 4 * config.num_hidden_layers * kv * (num_processes - 1) * 2


@case("C1", group="context_parallel")
def received() -> Iterator[Row]:
    for num_processes in (2, 4):
        _, several = compared(num_processes)
        most = max(each.received for each in several)
        peer = "keys and values of all layers and their gradients (computed)"
        yield Row(f"{SHAPE}, {num_processes} processes", "bytes got", most, peer, every_layer(num_processes), 1)


@case("C2", group="context_parallel")
def held() -> Iterator[Row]:
    for num_processes in (2, 4):
        alone, several = compared(num_processes)
        most = max(each.peak for each in several)
        shape = f"{SHAPE}, {num_processes} processes"
        yield Row(shape, "peak bytes of a step", most, "one process", alone.peak, 0.75 * num_processes)


@case("C3", group="context_parallel")
def time_of_a_step() -> Iterator[Row]:
    for num_processes in (2, 4):
        alone, several = compared(num_processes)
        busiest = max(each.seconds for each in several)
        shape = f"{SHAPE}, {num_processes} processes of one thread"
        target = 0.75 * num_processes
        yield Row(shape, "step, CPU s of the busiest process", busiest, "one process", alone.seconds, target)
