"""The compiled CPU kernel: numbers, and what happens where it cannot be compiled or fails its check."""

import platform
import subprocess

import pytest
import torch

from kernels.gca import build, cache, native

RESULTS = ["out", "grad_q", "grad_k", "grad_v", "grad_weights"]
SHAPES = [
    {"S": 17, "C": 24, "K": 3, "H": 6, "Hk": 2, "D": 96},
    {"S": 65, "C": 64, "K": 11, "H": 1, "Hk": 1, "D": 64, "E": 3},
    {"S": 1, "N": 1, "C": 96, "K": 1, "H": 8, "Hk": 2, "D": 24, "E": 30},
    {"S": 3, "C": 150, "K": 2, "H": 5, "Hk": 5, "D": 1, "E": 4},
    {"S": 1, "N": 1, "C": 1, "K": 1, "H": 1, "Hk": 1, "D": 1, "E": 1},
]


@pytest.fixture(autouse=True)
def fresh():
    """What was compiled and checked in one test does not serve the next."""
    build.library.cache_clear()
    native._works.cache_clear()
    yield
    build.library.cache_clear()
    native._works.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    if build.library() is None:
        pytest.skip("no C compiler")
    assert native._works()  # before calls are noted
    used = []
    for name in ("forward", "backward"):
        function = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, f=function, n=name, **o: used.append(n) or f(*a, **o))
    yield
    assert "forward" in used and "backward" in used  # what was tested is the compiled code


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "longhaul"


def rms_error(result, expected):
    return ((result.double() - expected).square().mean() / expected.square().mean().clamp(min=1e-12)).sqrt().item()


def exact(tensors):
    return {key: t.double() if t is not None and t.is_floating_point() else t for key, t in tensors.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_error_is_that_of_pytorch(compiled, gca_inputs, run_gca, shape, ragged):
    tensors = gca_inputs(**shape, ragged=ragged)
    options = {"softmax_off_by_one": ragged}
    expected = run_gca(exact(tensors), "reference", **options)
    results, peer = run_gca(tensors, "auto", **options), run_gca(tensors, "cpu", **options)
    for key in RESULTS:
        assert rms_error(results[key], expected[key]) <= max(2 * rms_error(peer[key], expected[key]), 1e-6), key


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_and_a_negative_scale(compiled, gca_inputs, run_gca, threads):
    tensors = gca_inputs(H=5, Hk=5, N=20, S=9, K=4)
    expected = run_gca(exact(tensors), "reference", scale=-0.7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results, again = (run_gca(tensors, "auto", scale=-0.7) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for key in RESULTS:
        assert rms_error(results[key], expected[key]) <= 2e-6, key
        assert torch.equal(results[key], again[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_upcast_exactly(compiled, gca_inputs, run_gca, dtype):
    tensors = gca_inputs(dtype=dtype, H=8, Hk=8)
    wide = {key: t.float() if key in ("q", "k", "v", "grad_out") else t for key, t in tensors.items()}
    expected, results = run_gca(wide, "auto"), run_gca(tensors, "auto")
    for key in RESULTS:
        assert torch.equal(results[key], expected[key].to(results[key].dtype)), key


def test_large_scores_and_live_nan(compiled, gca_inputs, run_gca):
    tensors = gca_inputs(C=20)
    far = tensors | {"q": tensors["q"] * 300}
    expected, results = run_gca(exact(far), "reference"), run_gca(far, "auto")
    assert rms_error(results["out"], expected["out"]) <= 1e-4
    tensors["q"][0, 0, 0, 0, 0] = torch.nan
    broken = run_gca(tensors, "auto")["out"]
    assert (tensors["indices"][0, 0] >= 0).any()
    assert broken[0, 0, 0, 0].isnan().all() and not broken[0, 0, 1:].isnan().any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_dead_memory_has_no_influence(compiled, gca_inputs, run_gca, poison):
    tensors = gca_inputs(E=12, ragged=True)
    tensors["indices"][0, 0, 0] = -1
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    for b in range(2):
        chosen[b, tensors["indices"][b][tensors["indices"][b] >= 0].long()] = True
    dead = (torch.arange(9) >= tensors["kv_lengths"][..., None]) | ~chosen[..., None]
    empty = tensors["indices"] < 0
    clean = run_gca(tensors, "auto")
    tensors["k"][dead], tensors["v"][dead], tensors["weights"][empty] = poison, poison, poison
    results = run_gca(tensors, "auto")
    assert all(torch.equal(results[key], clean[key]) for key in RESULTS)
    assert not results["grad_k"][dead].any() and not results["grad_v"][dead].any()
    assert not results["grad_weights"][empty].any()


def test_every_value_of_the_base_2_exponential():
    """Scores that spread over the whole range: out = sum p v against float64."""
    if build.library() is None:
        pytest.skip("no C compiler")
    from kernels.gca import grouped_cross_attention

    scores = torch.linspace(-200, 0, 4096).view(1, 64, 64, 1, 1)
    q, values = torch.ones(1, 1, 1, 1, 1), torch.logspace(0, 30, 4096).view(1, 64, 64, 1, 1)
    indices, weights = torch.arange(64, dtype=torch.int32).view(1, 1, 64), torch.ones(1, 1, 64)
    for slot in range(64):
        arguments = q, scores, values, indices[..., slot : slot + 1], weights[..., :1]
        out = grouped_cross_attention(*arguments, scale=1.0)
        assert native.serves(q, scores)
        p = torch.softmax(scores[0, slot, :, 0, 0].double(), 0)
        wanted = (p * values[0, slot, :, 0, 0].double()).sum()
        assert abs(out.item() / wanted.item() - 1) < 1e-6


@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86 compilers")
def test_narrow_vectors(monkeypatch, own_cache, compiled, gca_inputs, run_gca):
    """Processors without 512 bit vectors take the other branch of the source."""
    build.library.cache_clear()
    native._works.cache_clear()
    monkeypatch.setattr(build, "OPTIONS", [*build.OPTIONS, "-mno-avx512f"])
    tensors = gca_inputs(**SHAPES[0])
    expected, results = run_gca(exact(tensors), "reference"), run_gca(tensors, "auto")
    assert all(rms_error(results[key], expected[key]) <= 2e-6 for key in RESULTS)


def test_compiled_once_and_a_damaged_file_is_not_loaded(monkeypatch, own_cache):
    if build.library() is None:
        pytest.skip("no C compiler")
    (path,) = own_cache.iterdir()
    commands = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **o: commands.append(command) or run(command, **o))
    build.library.cache_clear()
    assert build.library() is not None and len(commands) == 1  # the version of the compiler alone
    damaged = path.read_bytes()[:-100]
    path.unlink()  # not in place: this process has the library mapped, and runs its destructors at the end
    path.write_bytes(damaged)
    build.library.cache_clear()
    assert build.library() is not None and len(commands) == 3
    assert list(own_cache.iterdir()) == [path]


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)


def broken_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "OPTIONS", ["-there-is-no-such-option"])


def broken_source(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SOURCE", tmp_path / "broken.c")
    build.SOURCE.write_text("int gca_scratch(void) { return 0; }")


def wrong_result(monkeypatch, tmp_path):
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda *a, **o: tuple(x + 1e-2 for x in forward(*a, **o)))


@pytest.mark.parametrize("accident", [no_compiler, broken_compiler, broken_source, wrong_result])
def test_an_accident_leaves_the_plain_implementation(monkeypatch, own_cache, gca_inputs, run_gca, tmp_path, accident):
    tensors = gca_inputs()
    accident(monkeypatch, tmp_path)
    expected, results = run_gca(tensors, "cpu"), run_gca(tensors, "auto")
    assert all(torch.equal(results[key], expected[key]) for key in RESULTS)


def test_no_home_to_keep_files_in(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache.cache_folder() is None
    cache.write_atomically(tmp_path / "no" / "folder", b"")
    build.library()  # compiles into a temporary folder, or finds no compiler


def test_where_it_serves():
    q, k = torch.zeros(1, 2, 3, 4, 5), torch.zeros(1, 2, 3, 4, 5)
    assert native.serves(q, k) == (build.library() is not None)
    assert not native.serves(q.double(), k.double())
    assert not native.serves(q[:, :0], k)
