"""The Triton kernels: numbers in Triton's interpreter (its own processes), compiled code without a device, CUDA."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = Path(__file__).parent / "triton_checks.py"
GROUPS = ["fixtures", "shapes far", "descriptors", "reverse poison", "slices pieces", "operator memory"]


@pytest.mark.parametrize("check", GROUPS)
def test_in_the_interpreter(run_program, check):
    """The interpreter must be chosen before Triton is imported: each group of checks is a process."""
    run_program(CHECKS, *check.split(), interpret=True)


def test_compiles_without_spills(run_program):
    run_program("-m", "benchmarks.compile_triton", "--quick", interpret=False)


@pytest.mark.slow
def test_every_configuration_compiles_without_spills(run_program):
    """Every kernel and tile choice, sm_80 and sm_90: no spills, tensor cores used, shared memory within limits."""
    code = (
        "from benchmarks.compile_triton import problem_of, report\n"
        "bad = [row for row in report(quick=False) if problem_of(row)]\n"
        "assert not bad, bad"
    )
    run_program("-c", code, interpret=False)


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
