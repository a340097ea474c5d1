"""How a command ends: sentences and a status for errors and signals, the exception itself for developers."""

import signal

import pytest

from configuration.errors import ConfigError, Stopped, exit_with_sentence


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("wrong"), 2, "error: wrong\n"),
        (ConfigError(["a", "b"]), 2, "2 problems:\n  - a\n  - b\n"),
        (FileNotFoundError("no file x"), 2, "error: no file x\n"),
        (OSError("no answer.\nLook there."), 2, "error: no answer. Look there.\n"),
        (Stopped("terminated at step 3", signal.SIGTERM), 143, "terminated at step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_sentence_and_a_status(capsys, error, status, text):
    with pytest.raises(SystemExit) as end, exit_with_sentence([]):
        raise error
    assert end.value.code == status and capsys.readouterr().err == text
    with pytest.raises(type(error)), exit_with_sentence(["--traceback"]):
        raise error


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), exit_with_sentence([]):
        raise KeyError("bug")
