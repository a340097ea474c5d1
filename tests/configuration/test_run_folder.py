"""Starting, resuming and refusing runs."""

import json

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoint import AtomicCheckpointIO, checkpoint_step, find_checkpoint
from configuration.run_folder import differences, open_run, versions, write_start


@pytest.fixture
def config(tmp_path):
    return {
        "recipe": "r",
        "output": str(tmp_path / "run"),
        "resume": "auto",
        "seed": 1,
        "model": {"config": {"hidden_size": 8}},
        "data": {"path": "x", "num_workers": 0, "max_steps": 5},
        "trainer": {"max_steps": 5, "accumulate_grad_batches": 1, "precision": "32-true", "gradient_clip_val": 1.0},
    }


def save(folder, step):
    path = folder / "checkpoints" / f"step_{step}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": step, "w": torch.ones(3)}, path)
    return path


def test_a_new_folder_starts_and_a_started_one_resumes_from_the_newest(config, tmp_path):
    folder, checkpoint = open_run(config)
    assert checkpoint is None and not folder.exists()
    write_start(folder, config)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    assert json.loads((folder / "versions.json").read_text()) == versions()
    assert versions()["torch"] == torch.__version__
    save(folder, 9)
    newest = save(folder, 10)
    (folder / "checkpoints" / "step_11.ckpt.part").write_bytes(b"half")
    assert open_run(config) == (folder, newest)
    assert checkpoint_step(newest) == 10 and checkpoint_step("x/other.ckpt") is None


def test_other_options_refuse_and_free_ones_do_not(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    config["model"]["config"]["hidden_size"] = 16
    with pytest.raises(ValueError, match=r"model.config.hidden_size: 8 -> 16"):
        open_run(config)
    config["model"]["config"]["hidden_size"] = 8
    config["data"]["num_workers"] = 4
    config["trainer"]["max_steps"] = config["data"]["max_steps"] = 50
    assert open_run(config)[0] == folder
    config["trainer"]["accumulate_grad_batches"] = 2
    with pytest.raises(ValueError, match="accumulate_grad_batches: 1 -> 2"):
        open_run(config)


def test_resume_false_never_overwrites(config):
    folder, _ = open_run({**config, "resume": False})
    write_start(folder, config)
    with pytest.raises(FileExistsError, match="already holds a run"):
        open_run({**config, "resume": False})


def test_a_damaged_newest_checkpoint_is_named(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    save(folder, 1)
    whole = save(folder, 2)
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"step_2\.ckpt is damaged"):
        open_run(config)
    assert find_checkpoint(folder / "nowhere") is None


def test_differences_name_the_keys():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == ["a.c: 2 -> None", "a.d: None -> 3"]


def test_an_older_checkpoint_does_not_resume_over_later_ones(config):
    folder, _ = open_run(config)
    write_start(folder, config)
    older, newer = save(folder, 3), save(folder, 6)
    with pytest.raises(FileExistsError, match=r"step_6\.ckpt, later than step_3\.ckpt"):
        open_run({**config, "resume": str(older)})
    assert open_run({**config, "resume": str(newer)}) == (folder, newer)
    branch = {**config, "resume": str(older), "output": str(folder) + "_branch"}
    assert open_run(branch)[1] == older


def test_only_the_first_process_decides(config, monkeypatch):
    folder, _ = open_run(config)
    write_start(folder, config)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert open_run({**config, "resume": False}) == (folder, None)
