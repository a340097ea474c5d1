import csv

import pytest
import torch

from benchmarks import registry, run
from benchmarks.measure import allocations, check, cpu_seconds, poisoned
from benchmarks.registry import Row, case


def test_ratio_target_and_floor():
    faster = Row("s", "CPU s", 2.0, "peer", 6.0, 2.5, floor=3.5)
    assert faster.ratio == 3.0 and faster.reaches(2.5) and faster.broken
    smaller = Row("s", "bytes", 2.0, "peer", 8.0, 0.2, "lower", floor=0.3)
    assert smaller.ratio == 0.25 and not smaller.reaches(0.2) and not smaller.broken


def test_a_case_is_registered_once_and_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "CASES", [])
    monkeypatch.setattr(run, "CASES", registry.CASES)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run.pkgutil, "iter_modules", lambda path: [])

    @case("X1", group="toy")
    def toy():
        yield Row("4 x 4", "CPU s", 1.0, "peer", 0.5, 2.0, floor=1.0)

    @case("X2", group="toy", device="cuda")
    def absent():
        raise AssertionError("a GPU case must not run without one")

    with pytest.raises(ValueError, match="registered twice"):
        case("X1", group="toy")(toy)
    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert run.main(["toy"]) == 1  # below its floor
        assert run.main(["nothing"]) == 2
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr()
    assert "X2: skipped" in output.out and "no benchmark group or case nothing" in output.err
    with (tmp_path / "toy.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["case"] == "X1" and row["ratio"] == "0.5" and row["passed"] == "no" and row["torch"] == torch.__version__


def test_measures():
    peak, largest = allocations(lambda: torch.ones(1000).add(1.0))
    assert 8000 <= peak < 9000 and largest == 4000  # a few bytes for the scalar
    assert set(cpu_seconds({"a": lambda: None, "b": lambda: None}, 1)) == {"a", "b"}
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    check({"x": torch.ones(2)}, {"x": torch.ones(2)}, 1e-6)
    for wrong in (torch.tensor([1.0, 1.1]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(ArithmeticError, match="x is wrong"):
            check({"x": wrong}, {"x": torch.ones(2)}, 1e-3)
