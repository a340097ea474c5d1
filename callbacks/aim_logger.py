"""Aim beside TensorBoard: one Aim run for one run folder, however often it is resumed.

Notable: Aim's own logger starts another run at every resume; here the run's hash is kept in the run folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

RUN_FILE = "aim_run.txt"


def aim_logger(save_dir: str, *, repo: str | None = None, experiment: str | None = None, **options: Any) -> Any:
    """Return an ``AimLogger`` that goes on with the Aim run of a run folder.

    Args:
        save_dir: the run folder; its file ``aim_run.txt`` names the Aim run once something was logged.
        repo: where Aim keeps its runs, a folder or ``aim://SERVER:PORT``; None: the run folder.
        experiment: heading under which Aim shows the run.
        **options: further ones of ``aim.pytorch_lightning.AimLogger``.

    Raises:
        ValueError: Aim is not installed.
    """
    try:
        from aim.pytorch_lightning import AimLogger
    except ModuleNotFoundError as error:
        raise ValueError("logger=aim needs Aim: pip install aim, or choose logger=tensorboard") from error
    from lightning.pytorch.loggers.logger import rank_zero_experiment

    file = Path(save_dir) / RUN_FILE

    class FolderAimLogger(AimLogger):  # type: ignore[misc]  # Aim has no types
        """Remembers its run in the run folder."""

        @property
        @rank_zero_experiment
        def experiment(self) -> Any:
            run = super().experiment
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(f"{run.hash}\n", encoding="utf-8")
            return run

    known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    prefixes = {"subset": {"train": "train/", "val": "val/"}}
    return FolderAimLogger(
        repo=repo or str(save_dir), experiment=experiment, run_hash=known, context_prefixes=prefixes, **options
    )
