"""A tiny random Llama, sequences for it, and the slow way to score them: one forward per window."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from datamodules.sequence_store import SequenceStore
from losses.base_scoring import plan_windows
from preprocess.chunk_documents import main as chunk_main
from preprocess.command import run_command
from preprocess.score_tokens import main as score_main

LENGTH, BOS, VOCABULARY = 24, 1, 61
SCHEDULE = ["--base-length", 8, "--base-stride", 5]
QUIET = ["--device", "cpu", "--dtype", "float32", "--shard-size", 4]


def save_llama(folder: Path, *, seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes | {"initializer_range": 0.4} | options)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_sequences(folder: Path, *, seed: int = 0, options=("--bos-token-id", BOS)) -> Path:
    """19 sequences of 5 documents, with a shorter one and some whose first targets were counted before."""
    draw = np.random.default_rng(seed)
    documents = [draw.integers(2, VOCABULARY, size=size).tolist() for size in (92, 93, 9, 47, 138)]
    lines = [json.dumps({"id": i, "tokens": document}) + "\n" for i, document in enumerate(documents)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(lines))
    arguments = ["--input", source, "--output", folder, "--length", LENGTH, "--tail", "align", *options]
    assert run_command(chunk_main, [str(argument) for argument in arguments]) == 0
    return folder


def score(sequences: Path, model: Path, output: Path, *options) -> int:
    """Run the command in this process; later options win over those given here."""
    arguments = ["--sequences", sequences, "--model", model, "--output", output, *SCHEDULE, *QUIET, *options]
    return run_command(score_main, [str(argument) for argument in arguments])


def report(sequences: Path, output: Path, option: str) -> int:
    """Run --verify or --status; return the exit status."""
    try:
        return run_command(score_main, ["--sequences", str(sequences), "--output", str(output), option])
    except SystemExit as error:
        return int(error.code)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.npy"))}


@torch.no_grad()
def slow_scores(model_folder: Path, sequences: Path, *, schedule, first_window=True, bos=True) -> np.ndarray:
    """One forward per window of the model's own logits, float32 [n, T]."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    store, (length, stride, tail) = SequenceStore(sequences), schedule
    scores = np.full((len(store), store.length - 1), np.nan, np.float32)
    for number in range(len(store)):
        item = store[number]
        for start, first, end in plan_windows(store.length, length, stride, tail)[0 if first_window else 1 :]:
            window = item["input_ids"][start:end].clone()
            if bos:
                window[0] = BOS
            logits = model(window[None], use_cache=False).logits[0].double()
            for position in range(first, end):
                if item["valid"][position - 1]:
                    target = item["input_ids"][position]
                    scores[number, position - 1] = -logits[position - 1 - start].log_softmax(-1)[target]
    return scores
