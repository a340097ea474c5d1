"""Speed and memory of reading a context and decoding after it, by length and method.

`python -m benchmarks.kv_compression_table [--lengths 1024 4096 16384] [--slots 1 4] [--ratio 0.7]` runs on the GPU if
there is one and appends rows to benchmarks/results/kv_compression_table.csv. Weights are random: quality is not
measured.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.kv_compression import LARGE, SENTINELS, SMALL, bytes_of, model_of
from benchmarks.measure import allocations
from benchmarks.run import RESULTS, identity
from patches.rules import as_attention_mask, streaming
from patches.sentinel import EvictingCache, Sentinels, SpanSampler, compress

CHUNK, STEPS, NUM_SINKS = 1024, 16, 4
Step = Callable[[Tensor], object]


def read_dense(model: LlamaForCausalLM, ids: Tensor) -> tuple[Any, Step]:
    """Read into transformers' own cache."""
    cache = DynamicCache()
    for part in ids.split(CHUNK, 1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    return cache, lambda token: model(input_ids=token, past_key_values=cache)


def read_streaming(model: LlamaForCausalLM, ids: Tensor, ratio: float) -> tuple[Any, Step]:
    """Keep sinks and a window of (1 - ratio) T entries; the mask hides old ones at once, they leave in blocks."""
    window = int((1 - ratio) * ids.shape[1] + 0.5) - NUM_SINKS + 1
    cache, rule = EvictingCache(), streaming(NUM_SINKS, window)

    def feed(part: Tensor) -> None:
        row = torch.zeros_like(part)
        positions = torch.arange(cache.num_seen, cache.num_seen + part.shape[1], device=part.device).expand_as(part)
        cache.append(kind=row, span=row, position_ids=positions)
        mask = as_attention_mask(model, rule, query_index=positions, key_index=cache.index)
        options = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        model(input_ids=part, past_key_values=cache, **options)
        if cache.num_physical > window + NUM_SINKS + 64:
            cache.evict((cache.index < NUM_SINKS) | (cache.index > cache.num_seen - window))

    for part in ids.split(CHUNK, 1):
        feed(part)
    return cache, feed


def read_sentinel(model: LlamaForCausalLM, ids: Tensor, ratio: float, slots: int) -> tuple[Any, Step]:
    """Read in chunks, folding spans of about 25 tokens for each slot."""
    sentinels = Sentinels(SENTINELS.open_id, tuple(range(101, 101 + slots)))
    sampler = SpanSampler(ratio, max_length=25 * slots)
    context = compress(model, ids, sentinels, sampler=sampler, chunk_size=CHUNK)
    return context.cache, partial(context.extend, model)


@torch.no_grad()
def measure(model: LlamaForCausalLM, read: Callable[[], tuple[Any, Step]], num_tokens: int) -> dict[str, float]:
    """Read once for time and once for memory, then decode."""
    cuda = model.device.type == "cuda"
    token = torch.full((1, 1), 7, device=model.device)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    read()  # warm-up
    start = clock()
    cache, step = read()
    reading = clock() - start
    entries = cache.num_physical if isinstance(cache, EvictingCache) else cache.get_seq_length()
    live = cache.nbytes() if isinstance(cache, EvictingCache) else bytes_of(cache)
    times = []
    for _ in range(STEPS):
        start = clock()
        step(token)
        times.append(clock() - start)
    held = cache.allocated_bytes() if isinstance(cache, EvictingCache) else bytes_of(cache)
    del cache, step
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        read()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = allocations(read)[0]
    return {
        "read_tokens_per_s": num_tokens / reading,
        "ms_per_output_token": 1e3 * statistics.median(times),
        "peak_bytes": peak,
        "live_bytes": live,
        "allocated_bytes": held,
        "entries": entries,
    }


def main() -> None:
    """Measure every length and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--ratio", type=float, default=0.7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, dtype = (SMALL, torch.float32) if device == "cpu" else (LARGE, torch.bfloat16)
    model = model_of(sizes, device, dtype)
    path = RESULTS / "kv_compression_table.csv"
    for length in options.lengths:
        ids = torch.randint(0, 100, (1, length), device=device)
        methods: dict[str, Callable[[], tuple[Any, Step]]] = {
            "dense": partial(read_dense, model, ids),
            "streaming": partial(read_streaming, model, ids, options.ratio),
        }
        for slots in options.slots:
            methods[f"sentinel K={slots}"] = partial(read_sentinel, model, ids, options.ratio, slots)
        for name, read in methods.items():
            found = {key: f"{value:.4g}" for key, value in measure(model, read, length).items()}
            row = {**identity(device), "tokens": str(length), "method": name, "ratio": str(options.ratio), **found}
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print("  ".join([str(length), name, *(f"{key} {value}" for key, value in found.items())]), flush=True)


if __name__ == "__main__":
    main()
