import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "gca"


@pytest.fixture
def run_program(tmp_path):
    """Run Python in a process, with or without Triton's interpreter, which must be chosen before Triton is imported."""

    def run(*arguments, interpret):
        env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        env |= {"TRITON_INTERPRET": "1"} if interpret else {}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run


@pytest.fixture
def load():
    """Read one fixture file: its tensors, and its metadata with JSON decoded."""

    def decode(text):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def read(name):
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, {  # noqa: SIM118
                key: decode(value) for key, value in file.metadata().items()
            }

    return read


@pytest.fixture
def gca_inputs():
    """Make random arguments of grouped_cross_attention, with empty slots and duplicates."""

    def make(B=2, N=5, S=7, H=4, Hk=2, D=16, E=6, C=9, K=3, *, dtype=torch.float32, seed=0, ragged=False):
        generator = torch.Generator().manual_seed(seed)
        acc = torch.promote_types(dtype, torch.float32)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=acc)

        q, k, v = normal(B, N, S, H, D), normal(B, E, C, Hk, D), normal(B, E, C, Hk, D)
        indices = torch.randint(-1, E, (B, N, K), generator=generator, dtype=torch.int32)
        tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "indices": indices, "weights": normal(B, N, K)}
        lengths = torch.randint(0, C + 1, (B, E), generator=generator, dtype=torch.int32) if ragged else None
        return tensors | {"kv_lengths": lengths, "grad_out": normal(B, N, S, H, D).to(dtype)}

    return make


@pytest.fixture
def run_gca():
    """Run forward and backward; returns out and the four gradients by name."""
    from kernels.gca import grouped_cross_attention

    def run(tensors, implementation, *, scale=None, softmax_off_by_one=False):
        leaves = {name: tensors[name].detach().clone().requires_grad_() for name in ("q", "k", "v", "weights")}
        out = grouped_cross_attention(
            *(leaves.get(name, tensors[name]) for name in ("q", "k", "v", "indices", "weights")),
            kv_lengths=tensors.get("kv_lengths"),
            scale=scale,
            softmax_off_by_one=softmax_off_by_one,
            implementation=implementation,
        )
        if "grad_out" in tensors:
            out.backward(tensors["grad_out"])
        return {"out": out.detach()} | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}

    return run
