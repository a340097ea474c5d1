"""Cases T1 and T2: a training step of a small DRT, and what the Trainer and the loader add to it, on a CPU."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import check, cpu_seconds
from benchmarks.registry import Row, case
from callbacks.loss_log import LossLog
from callbacks.nan_guard import NaNGuard
from callbacks.throughput import Throughput
from datamodules.packed_text import PackedTextDataModule
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.optimization import Optimization
from models.drt import DRTConfig, DRTForCausalLM
from preprocess.index import CorpusWriter

VOCAB, WIDTH, LAYERS, TEXT_IDS = 264, 128, 2, 256
STEPS, LENGTH, BATCH, TURNS = 5, 1024, 2, 5
# Options of a Trainer that does nothing but train.
TRAINING_ALONE: dict[str, Any] = {
    "max_epochs": -1,
    "limit_val_batches": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def _drt(**changes: Any) -> DRTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 320, "num_attention_heads": 4, "num_encoder_layers": 1}
    retrieval = {"num_lower_layers": 1, "layers_per_group": [1], "chunk_size": 63, "chunk_top_k": 4}
    ids = {"landmark_token_id": 263, "pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 256}
    options = sizes | retrieval | ids | {"vocab_size": VOCAB, "window_size": 129}
    return DRTForCausalLM(DRTConfig(**(options | changes))).train()


def _full_attention() -> LlamaForCausalLM:
    """Build a Llama of as many layers and nearly as many parameters (a wider MLP for the parts it lacks)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=640,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def _full_attention_flops(model: LlamaForCausalLM, length: int) -> float:
    """Count forward and backward per token: 6 per parameter, and (T + 1) / 2 keys in both products of every layer."""
    parameters = sum(p.numel() for p in model.parameters())
    return 6 * parameters + LAYERS * 3 * 2 * 2 * WIDTH * (length + 1) / 2


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(TEXT_IDS, (1, length), generator=torch.Generator().manual_seed(length))


def _step(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@case("T1", group="training")
def against_full_attention() -> Iterator[Row]:
    exact = _drt(retrieval_noise=None, gca_implementation="reference", attention_implementation="reference").double()
    check(_step(_drt(retrieval_noise=None), _tokens(512)), _step(exact, _tokens(512)), 1e-4)
    drt, full = _drt(), _full_attention()
    # A step of full attention at 16K takes ten seconds, hence one warm-up and one turn there.
    for length, repeats in ((4096, 5), (16384, 1)):
        tokens = _tokens(length)
        best = cpu_seconds({"ours": partial(_step, drt, tokens), "full": partial(_step, full, tokens)}, repeats)
        flop_ratio = _full_attention_flops(full, length) / drt.num_flops_per_token(length)
        shape = f"{length} tokens, width {WIDTH}, {LAYERS} layers; FLOP ratio {flop_ratio:.2f}"
        target = round(0.75 * flop_ratio, 2)
        yield Row(shape, "training step, CPU s", best["ours"], "full attention (SDPA)", best["full"], target)


@case("T2", group="training")
def trainer_and_loader() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_corpus(Path(folder))
        best, weights = {"trainer": float("inf"), "bare": float("inf")}, {}
        for _ in range(TURNS):
            for name, run in (("trainer", _trainer_loop), ("bare", _bare_loop)):
                seconds, weights[name] = run(folder)
                best[name] = min(best[name], seconds)
        check(weights["trainer"], weights["bare"], 0.0)
        loader = _loader_seconds(folder)
    shape = f"{BATCH} x {LENGTH} tokens, width {WIDTH}, {LAYERS} layers"
    yield Row(shape, "training loop, CPU s per step", best["trainer"], "bare loop", best["bare"], 1.03, "lower")
    yield Row(shape, "data loader alone, CPU s per step", loader, "bare loop", best["bare"], 20, floor=20)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def write_corpus(folder: Path) -> None:
    options: dict[str, Any] = {
        "dtype": "uint16",
        "tokenizer": "random",
        "vocab_size": VOCAB,
        "eos_token_id": 256,
        "source": "random",
    }
    for split, size in (("train", 200_000), ("validation", 2_000)):
        with CorpusWriter(folder / split, **options) as writer:
            writer.add(np.random.default_rng(size).integers(TEXT_IDS, size=size))


def make_data(folder: str, max_steps: int = STEPS) -> PackedTextDataModule:
    return PackedTextDataModule(folder, context_length=LENGTH, batch_size=BATCH, max_steps=max_steps)


def make_module() -> CausalLMModule:
    build: Callable[[], Any] = partial(_drt, retrieval_noise=None)
    return CausalLMModule(build, optimization=Optimization(warmup_steps=2), max_steps=STEPS)


class Stopwatch(pl.Callback):
    """CPU time from the end of the first step to the end of the last one, as the bare loop takes it."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.end = time.process_time()
        if trainer.global_step == 1:
            self.start = self.end


def _trainer_loop(folder: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Train with the logger and the watching callbacks of every run; return CPU seconds per step and the weights."""
    watch, module = Stopwatch(), make_module()
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        logger=TensorBoardLogger(folder),
        callbacks=[LossLog(f"{folder}/train.jsonl"), Throughput(), NaNGuard(), watch],
        **TRAINING_ALONE,
    )
    trainer.fit(module, datamodule=make_data(folder))
    return (watch.end - watch.start) / (STEPS - 1), dict(module.model.named_parameters())


def _bare_loop(folder: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Do the same in a plain loop."""
    module = make_module()
    module.configure_model()
    model, optimizer = module.model, module.configure_optimizers()
    start = 0.0
    for step, batch in enumerate(make_data(folder).train_dataloader()):
        for group in optimizer.param_groups:
            group["lr"] = module.optimization.lr_at(step + 1, STEPS)
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 0:
            start = time.process_time()
    return (time.process_time() - start) / (STEPS - 1), dict(model.named_parameters())


def _loader_seconds(folder: str, num_batches: int = 500) -> float:
    loader = iter(make_data(folder, num_batches).train_dataloader())
    next(loader)
    start = time.process_time()
    count = sum(1 for _ in loader)
    return (time.process_time() - start) / count
