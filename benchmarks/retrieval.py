"""Cases R1 and R4: causal retrieval on a CPU."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import allocations, cpu_seconds, poisoned
from benchmarks.peers import retrieve_dense
from benchmarks.registry import Row, case
from kernels.gca import chunk_weights, retrieve_chunks

CHUNKS, WIDTH, TOP_K = 4096, 768, 8
SHAPE = f"{CHUNKS} chunks, width {WIDTH}, K {TOP_K}"


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, landmarks = (torch.randn(1, CHUNKS, WIDTH, generator=generator) for _ in range(2))
    return queries, landmarks


@case("R1", group="retrieval")
def select() -> Iterator[Row]:
    queries, landmarks = _inputs()
    with poisoned():
        indices, _ = retrieve_chunks(queries, landmarks, TOP_K)
    exact, _ = retrieve_dense(queries.double(), landmarks.double(), TOP_K)
    agreement = (indices[:, TOP_K:] == exact[:, TOP_K:]).double().mean().item()
    if agreement < 0.9995:  # float32 may swap neighbours that differ in the last bits
        raise ArithmeticError(f"only {agreement:.4%} of the selected chunks are those of float64")
    ours = partial(retrieve_chunks, queries, landmarks, TOP_K)
    best = cpu_seconds({"ours": ours, "dense": partial(retrieve_dense, queries, landmarks, TOP_K)})
    yield Row(SHAPE, "selection, CPU s", best["ours"], "matrix, mask, topk", best["dense"], 2.5)
    yield Row(SHAPE, "selection, extra bytes", allocations(ours)[0], "64 MB", 64e6, 1, "lower", floor=1)


@case("R4", group="retrieval")
def backward() -> Iterator[Row]:
    queries, landmarks = (x.requires_grad_() for x in _inputs())
    weights = chunk_weights(retrieve_chunks(queries, landmarks, TOP_K)[1])
    peak = allocations(lambda: weights.square().sum().backward())[0]
    gathered = CHUNKS * TOP_K * WIDTH * 4
    yield Row(SHAPE, "backward of the weights, peak bytes", peak, "C K D float32", gathered, 1, "lower", floor=1)
