"""The bar of an evaluation: seen on a terminal, and no trace of it in a log."""

import pytest
from rich.console import Console

from evaluation import token_progress


@pytest.mark.parametrize(("terminal", "show"), [(True, True), (True, False), (False, True)])
def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch, capsys, terminal, show):
    monkeypatch.setattr(
        token_progress, "Console", lambda *, stderr: Console(stderr=stderr, force_terminal=terminal, width=80)
    )
    with token_progress.TokenProgress("scoring 512", 100, show=show) as advance:
        advance(50)
    written = capsys.readouterr().err
    assert ("scoring 512" in written) if terminal and show else written == ""
