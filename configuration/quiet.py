"""What libraries say that is no news to whoever runs a command, by its words; every other warning is shown."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging

_NO_NEWS = (
    ".*LeafSpec.*",
    ".*exists and is not empty.*",  # ours to resume
)


def quiet() -> None:
    """Keep advertisements, progress bars of tiny files and warnings without consequence off the screen."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message=message)
