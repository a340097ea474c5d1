"""The Aim logger: one Aim run for a run folder. Aim itself is optional, so a stand-in has its constructor and run."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from callbacks.aim_logger import RUN_FILE, aim_logger
from configuration.compose import compose


@pytest.fixture
def aim(monkeypatch):
    """A module ``aim.pytorch_lightning`` whose logger makes runs a, b, ... as Aim's does."""
    made = iter("abc")

    class AimLogger:
        def __init__(self, repo=None, experiment=None, run_hash=None, context_prefixes=None, **options):
            self.repo, self.run_hash, self.context_prefixes, self.options = repo, run_hash, context_prefixes, options
            self.run = None

        @property
        def experiment(self):
            self.run = self.run or SimpleNamespace(hash=self.run_hash or next(made))
            return self.run

    module = ModuleType("aim.pytorch_lightning")
    module.AimLogger = AimLogger
    monkeypatch.setitem(sys.modules, "aim", ModuleType("aim"))
    monkeypatch.setitem(sys.modules, "aim.pytorch_lightning", module)


def test_a_resumed_run_goes_on_in_its_aim_run(aim, tmp_path):
    first = aim_logger(str(tmp_path / "run"), log_system_params=False)
    assert first.repo == str(tmp_path / "run") and first.options == {"log_system_params": False}
    assert not (tmp_path / "run").exists()  # nothing is written before something is logged
    assert first.experiment.hash == first.experiment.hash == "a"
    assert (tmp_path / "run" / RUN_FILE).read_text() == "a\n"
    assert aim_logger(str(tmp_path / "run")).experiment.hash == "a"
    assert aim_logger(str(tmp_path / "other"), repo="shared").experiment.hash == "b"


def test_metrics_keep_their_split(aim, tmp_path):
    assert aim_logger(str(tmp_path)).context_prefixes == {"subset": {"train": "train/", "val": "val/"}}


def test_without_aim(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aim", None)
    with pytest.raises(ValueError, match="pip install aim"):
        aim_logger(str(tmp_path))


def test_two_loggers_at_once():
    config = compose(["recipe=quickstart", "scale=tiny", "logger=[tensorboard,aim]"], command="train")
    assert set(config["logger"]) == {"tensorboard", "aim"}
