"""What libraries say that is no news to whoever runs a command, by its words; every other warning is one line."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from transformers.utils import logging as transformers_logging

_NO_NEWS = (
    ".*torch.distributed.* is deprecated.*",  # called by the engines of sharded training
    ".*Since DeepSpeed handles gradient clipping internally.*",  # by trainer.gradient_clip_val, as it is set
    ".*LeafSpec.*",
    ".*exists and is not empty.*",  # ours to resume
    ".*gradient_checkpointing_enable. is deprecated.*",  # in favour of a name that older supported versions lack
    ".*is_gradient_checkpointing. is deprecated.*",  # asked for by peft
)


def quiet() -> None:
    """Keep advertisements, progress bars of tiny files and warnings without consequence off the screen.

    The other warnings are printed without the line of code that raised them.
    """
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = _one_line


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"
