"""The flow of evaluation: which tasks may be started several times over."""

from types import SimpleNamespace

import pytest

import configuration.check
import configuration.run_folder
import configuration.task as flow
from configuration.errors import ConfigError


def test_tasks_of_one_process_refuse_to_be_started_several_times(monkeypatch, tmp_path):
    started = []
    task = SimpleNamespace(run=started.append)
    config = {"recipe": "some", "task": {}, "output": str(tmp_path)}
    monkeypatch.setattr(flow, "compose", lambda arguments, **options: config)
    monkeypatch.setattr(flow, "build", lambda options: task)
    monkeypatch.setattr(configuration.check, "check", lambda config: None)
    monkeypatch.setattr(configuration.run_folder, "write_start", lambda folder, config: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="recipe=some works in one process, 2 were started: leave torchrun out"):
        flow.run_task([], print, command="eval")
    assert not started
    task.process = "shared"
    flow.run_task([], print, command="eval")
    assert started == [tmp_path]
