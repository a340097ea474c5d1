"""Cases D1 and D2: a training step of one process and of two under DDP and FSDP2, one thread each, Trainer included.

A step has four sequences, two at a time on each process; a case is refused unless two processes lose what one does.
CPU time of the busiest process: the best that two idle cores could do, whatever else a shared machine runs.
"""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.registry import Row, case
from callbacks.sharded_strategies import FullyShardedData
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.optimization import Optimization
from models.drt import DRTConfig, DRTForCausalLM

ROWS, LENGTH, STEPS = 2, 1024, 3
SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4}
STRATEGIES: dict[str, Callable[[], Any]] = {"DDP": lambda: "ddp", "FSDP2": lambda: FullyShardedData(False)}


def drt() -> DRTForCausalLM:
    """Build a DRT of 5.2M parameters."""
    ids = {"landmark_token_id": 4095, "pad_token_id": 4094, "bos_token_id": 4093, "eos_token_id": 4093}
    retrieval = {"num_lower_layers": 2, "layers_per_group": [2], "num_encoder_layers": 1, "chunk_top_k": 4}
    return DRTForCausalLM(DRTConfig(**SIZES, **ids, **retrieval, window_size=257, retrieval_noise=None))


def llama() -> LlamaForCausalLM:
    """Build a Llama of 4.1M parameters."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4, tie_word_embeddings=True))


def sequences(rank: int, processes: int) -> list[dict[str, torch.Tensor]]:
    """Return the batches of one process: together all processes read the same rows, whatever their number."""
    rows = torch.randint(4000, (STEPS, 2 * ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    mine = rows[:, rank * ROWS : (rank + 1) * ROWS] if processes > 1 else rows.view(2 * STEPS, ROWS, LENGTH)
    targets = torch.tensor(2 // processes * ROWS * (LENGTH - 1))
    return [{"input_ids": ids, "labels": ids, "num_step_targets": targets} for ids in mine]


class Watch(pl.Callback):
    """Loss of every micro-batch, and CPU time at the end of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """Note the loss; take a mark after every step."""
        self.losses.append(float(outputs["nll_sum"]) / float(outputs["num_targets"]))
        if not trainer.fit_loop._should_accumulate():
            self.times.append(time.process_time())


def train(rank: int, processes: int, port: int, build: Callable[[], Any], strategy: str, folder: str) -> None:
    """Train in one process of a run; write losses and marks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "ranks"}
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=STRATEGIES[strategy]() if processes > 1 else "auto",
        max_steps=STEPS,
        accumulate_grad_batches=2 // processes,
        gradient_clip_val=1.0,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[watch],
    )
    module = CausalLMModule(build, optimization=Optimization(warmup_steps=2), max_steps=STEPS)
    trainer.fit(module, DataLoader(sequences(rank, processes), batch_size=None))
    torch.save((watch.losses, watch.times), f"{folder}/{rank}.pt")


def measured(build: Callable[[], Any], strategy: str, processes: int) -> tuple[float, torch.Tensor]:
    """Return the CPU seconds of a step in the busiest process, and the mean loss of every step."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        torch.multiprocessing.spawn(train, (processes, port, build, strategy, folder), nprocs=processes)
        losses, times = zip(*(torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)), strict=True)
    mean = torch.tensor(losses).view(processes, STEPS, -1).mean((0, 2))
    steps = (min(later - before for before, later in pairwise(marks)) for marks in times)
    return max(steps), mean


def compared(build: Callable[[], Any]) -> Iterator[Row]:
    """Compare two processes with one, on the same four sequences a step."""
    alone, expected = measured(build, "DDP", 1)
    tokens, size = 2 * ROWS * LENGTH, sum(p.numel() for p in build().parameters())
    for strategy in STRATEGIES:
        seconds, losses = measured(build, strategy, 2)
        if not torch.allclose(losses, expected, rtol=1e-4):
            raise ArithmeticError(f"{strategy} loses {losses.tolist()}, one process {expected.tolist()}")
        shape = f"{strategy}, {size / 1e6:.1f}M parameters, {LENGTH} tokens, {tokens / seconds:,.0f} tokens/s"
        other = f"one process, {tokens / alone:,.0f} tokens/s"
        yield Row(shape, f"CPU s of {2 * ROWS} sequences", seconds, other, alone, 1.7)


@case("D1", group="ranks")
def drt_on_two_processes() -> Iterator[Row]:
    yield from compared(drt)


@case("D2", group="ranks")
def llama_on_two_processes() -> Iterator[Row]:
    yield from compared(llama)
