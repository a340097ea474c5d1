"""Speed and memory of reading a context and decoding after it, by length and method.

`python -m benchmarks.kv_compression_table [--lengths 1024 4096 16384] [--slots 1 4] [--ratio 0.7]` runs on the GPU if
there is one, appends rows to benchmarks/results/kv_compression_table.csv and draws the newest row of each method and
length as benchmarks/figures/kv_compression_table.png. Weights are random: quality is not measured.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.kv_compression import LARGE, SENTINELS, SMALL, bytes_of, model_of
from benchmarks.measure import allocations
from benchmarks.run import RESULTS, identity
from evaluation.figures import COLOURS, MARKERS
from patches.rules import Rule, as_attention_mask, local, streaming
from patches.sentinel import EvictingCache, Sentinels, SpanSampler, compress

CHUNK, STEPS, NUM_SINKS = 1024, 16, 4
FIGURES = RESULTS.parent / "figures"
PANELS = (
    ("read_tokens_per_s", "reading, tokens/s", 1.0),
    ("ms_per_output_token", "decoding, ms/token", 1.0),
    ("live_bytes", "cache, MB", 1e-6),
    ("peak_bytes", "peak memory of reading, MB", 1e-6),
)
Step = Callable[[Tensor], object]


def read_dense(model: LlamaForCausalLM, ids: Tensor) -> tuple[Any, Step]:
    """Read into transformers' own cache."""
    cache = DynamicCache()
    for part in ids.split(CHUNK, 1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    return cache, lambda token: model(input_ids=token, past_key_values=cache)


def read_streaming(model: LlamaForCausalLM, ids: Tensor, ratio: float) -> tuple[Any, Step]:
    """Keep sinks and a window of (1 - ratio) T entries."""
    window = int((1 - ratio) * ids.shape[1] + 0.5) - NUM_SINKS + 1
    return read_rule(model, ids, streaming(NUM_SINKS, window))


def read_local(model: LlamaForCausalLM, ids: Tensor, ratio: float) -> tuple[Any, Step]:
    """Keep the newest (1 - ratio) t entries of t tokens."""
    return read_rule(model, ids, local(ratio))


def read_rule(model: LlamaForCausalLM, ids: Tensor, rule: Rule) -> tuple[Any, Step]:
    """Read under a rule; its mask hides old entries at once, they leave in blocks."""
    cache = EvictingCache()

    def feed(part: Tensor) -> None:
        row = torch.zeros_like(part)
        positions = torch.arange(cache.num_seen, cache.num_seen + part.shape[1], device=part.device).expand_as(part)
        cache.append(kind=row, span=row, position_ids=positions)
        mask = as_attention_mask(model, rule, query_index=positions, key_index=cache.index)
        options = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        model(input_ids=part, past_key_values=cache, **options)
        first = torch.zeros(1, 1, dtype=torch.int64, device=part.device)
        seen = rule(first, first, first + cache.num_seen, cache.index)
        if int((~seen).sum()) > 64:
            cache.evict(seen)

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
            "local": partial(read_local, model, ids, options.ratio),
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
    draw(path, FIGURES / "kv_compression_table.png")


def draw(table: Path, path: Path) -> None:
    """Draw the newest row of each machine's methods and lengths: speed, latency, memory against the length."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["machine"] == rows[-1]["machine"] and row["ratio"] == rows[-1]["ratio"]]
    newest = {(row["method"], int(row["tokens"])): row for row in rows}
    figure = Figure(figsize=(3.4 * len(PANELS), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label, scale) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for index, method in enumerate(dict.fromkeys(method for method, _ in newest)):
            points = sorted((size, float(row[name]) * scale) for (own, size), row in newest.items() if own == method)
            look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            axes.plot([x for x, _ in points], [y for _, y in points], label=method, markersize=5, **look)
        lengths = sorted({size for _, size in newest})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{size // 1024}K" for size in lengths])
        axes.set_yscale("log")
        axes.set_xlabel("tokens read")
        axes.set_title(label, loc="left", fontsize="medium")
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{rows[-1]['ratio']} removed; {rows[-1]['machine']}, {rows[-1]['torch']}", fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
