"""The Triton kernels: numbers in Triton's interpreter (its own processes), compiled code without a device, CUDA."""

import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from kernels.gca import grouped_cross_attention, reverse_index

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).parent / "triton_checks.py"


def run(*arguments, interpret, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


GROUPS = ["fixtures", "shapes", "descriptors", "far", "reverse", "pieces", "poison", "operator", "memory"]


@pytest.mark.parametrize("check", GROUPS)
def test_in_the_interpreter(check, tmp_path):
    """The interpreter must be chosen before Triton is imported: each group of checks is a process."""
    run(str(CHECKS), check, interpret=True, folder=tmp_path)


COMPILE = """
import json
from benchmarks.compile_triton import problem_of, report
rows = list(report(quick=%r))
print(json.dumps([len(rows), sum(row["tma"] > 0 for row in rows), [row | {"why": problem_of(row)} for row in rows if problem_of(row)]]))
"""


def test_compiles_without_spills(tmp_path):
    """All four kernels for sm_80 and sm_90, the default tiles and others; two of them with tensor descriptors."""
    output = run("-c", COMPILE % True, interpret=False, folder=tmp_path)
    count, described, bad = json.loads(output.splitlines()[-1])
    assert not bad and count == 14 and described == 2


@pytest.mark.slow
def test_every_configuration_compiles_without_spills(tmp_path):
    """Every kernel and tile choice, sm_80 and sm_90: no spills, tensor cores used, shared memory within limits."""
    output = run("-c", COMPILE % False, interpret=False, folder=tmp_path)
    count, described, bad = json.loads(output.splitlines()[-1])
    assert not bad and count > 700 and described > 20


def test_the_report_tells_what_is_wrong():
    from benchmarks.compile_triton import problem_of

    good = {"kernel": "forward", "arch": 80, "dtype": "float16", "stack": 0, "shared": 1000, "mma": 8}
    good |= {"descriptors": False, "tma": 0}
    assert problem_of(good) is None
    assert "spills 8" in problem_of(good | {"stack": 8})
    assert (
        "shared" in problem_of(good | {"shared": 170_000})
        and problem_of(good | {"shared": 170_000, "arch": 90}) is None
    )
    assert "tensor-core" in problem_of(good | {"mma": 0}) and problem_of(good | {"mma": 0, "dtype": "float32"}) is None
    assert "descriptor" in problem_of(good | {"descriptors": True})


def test_refuses_what_it_cannot_run(gca_inputs, run_gca):
    with pytest.raises(ValueError, match="float64"):
        run_gca(gca_inputs(dtype=torch.float64), "triton")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        run_gca(gca_inputs(), "triton")


def test_reverse_map_lists_every_filled_slot_once():
    from kernels.gca.reverse_map import PIECE, ReverseMap

    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 5, (2, 30, 4), generator=generator, dtype=torch.int32)
    indices[1] = torch.where(indices[1] > 2, 0, indices[1])
    table, flat = ReverseMap.build(indices, 5), indices.flatten()
    parts = []
    for place in range(10):
        wanted = ((flat == place % 5) & (torch.arange(240) // 120 == place // 5)).nonzero().flatten().tolist()
        mine = (table.piece_chunk == place) & (table.piece_stop > table.piece_start)
        found = []
        for start, stop in zip(table.piece_start[mine].tolist(), table.piece_stop[mine].tolist(), strict=True):
            assert 0 < stop - start <= PIECE
            found += table.order[start:stop].tolist()
        assert found == wanted
        assert table.chunk_pieces[place] == mine.sum()
        if mine.sum() == 1:
            assert table.piece_part[mine].item() == -1
        elif mine.sum() > 1:
            first = table.chunk_part[place].item()
            assert table.piece_part[mine].tolist() == list(range(first, first + int(mine.sum())))
            parts += table.piece_part[mine].tolist()
    assert len(parts) == len(set(parts)) and max(parts) < table.max_parts
    again = ReverseMap.unpack(table.pack(), indices, 5)
    assert all(torch.equal(x, y) for x, y in zip(astuple(table), astuple(again), strict=True))


def test_a_reverse_index_of_another_retrieval_is_refused(gca_inputs):
    t = gca_inputs()
    arguments = [t[name] for name in ("q", "k", "v", "indices", "weights")]
    index = reverse_index(t["indices"], 6)
    expected = grouped_cross_attention(*arguments)
    assert torch.equal(grouped_cross_attention(*arguments, reverse=index), expected)
    for wrong in (reverse_index(t["indices"], 7), index.long(), index[:-1]):
        with pytest.raises(ValueError, match=r"reverse must be reverse_index\(indices, 6\)"):
            grouped_cross_attention(*arguments, reverse=wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu(gca_inputs, run_gca, dtype, size):
    shape = {"B": 2, "N": 40, "S": 65, "C": 64, "E": 40, "K": 8, "H": 4, "Hk": 2, "D": size}
    tensors = gca_inputs(**shape, dtype=dtype, ragged=True)
    exact = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}
    expected, peer = run_gca(exact, "reference"), run_gca(tensors, "cpu")
    cuda = {key: None if t is None else t.cuda() for key, t in tensors.items()}
    results, again = run_gca(cuda, "auto"), run_gca(cuda, "triton")
    for key, reference in expected.items():
        assert torch.equal(results[key], again[key]), key
        error = (results[key].cpu().double() - reference).abs().max()
        allowed = (peer[key].double() - reference).abs().max()
        limit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10 if dtype == torch.float16 else 1e-5
        assert error <= max(2 * allowed, limit * reference.abs().max()), key
