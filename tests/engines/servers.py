"""vLLM's own server on a tiny model, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import quiet_vllm
from vgf_llm.engines.vllm_env import IN_OWN_PROCESS
from vgf_llm.engines.vllm_request import PROCESSOR

_START_SEC = 400


@contextlib.contextmanager
def running_server(model: Path, *flags: str, plans: bool = True, **environment: str) -> Iterator[str]:
    """Yield the URL of a server of a model, named "tiny"; it ends with the context.

    Args:
        model: Its folder.
        flags: Further ones of the server.
        plans: Whether it runs the plan processor; a classifier writes nothing.
        environment: Further variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = dict(os.environ)
    quiet_vllm(variables)
    variables |= {**IN_OWN_PROCESS, "PYTHONPATH": os.getcwd(), **environment}
    process = subprocess.Popen(
        [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host",
            "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--max-logprobs", "64",
            "--kv-cache-memory-bytes", str(2**26), "--enforce-eager", "--served-model-name", "tiny",
            *(("--logits-processors", PROCESSOR) if plans else ()), *flags,
        ],
        env=variables,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(url: str, process: subprocess.Popen) -> None:
    for _ in range(_START_SEC):
        assert process.poll() is None, f"the server ended with exit code {process.returncode}"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not start in {_START_SEC} s")
