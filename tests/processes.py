"""Run a function in several processes as torchrun would, forked from this one: nothing is imported again."""

import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.multiprocessing
from lightning.pytorch.utilities import rank_zero_only  # here, not in every child


def run_in_processes(num_processes, function, *arguments, timeout=240):
    """Call ``function(*arguments)`` in every process; return the exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    started = [
        context.Process(target=_child, args=(rank, num_processes, port, function, arguments))
        for rank in range(num_processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _child(rank, num_processes, port, function, arguments):
    if num_processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def error_log(folder: Path):
    """Send the error stream of this process to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not the descriptor: the test runner has put an object of its own in front of it.
    sys.stderr = (folder / f"{os.environ.get('RANK', 0)}.err").open("a", buffering=1)
