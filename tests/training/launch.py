"""Run a script in several CPU processes under ``accelerate launch``, as a user does, with a time limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(config: str | Path, *command: str | Path, processes: int = 2, timeout: float = 100) -> str:
    """Run ``accelerate launch --config_file config command`` and return what it printed.

    Args:
        config: an accelerate configuration file.
        command: a script and its arguments, or ``-m``, a module and its arguments.
        processes: processes on this machine, over gloo.
        timeout: seconds until all of them are killed.

    Returns:
        Standard output and standard error together.

    Raises:
        AssertionError: it ended with another code than 0, or not in time; the end of its output is shown.
    """
    head = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    head += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    # gloo over the loopback needs no name lookup; two idle OpenMP pools on two cores would wait for each other
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        [*head, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} seconds:\n{output[-6000:]}") from None
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output[-6000:]}"
    return output
