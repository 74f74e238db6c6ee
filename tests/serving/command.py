"""``vgf-llm serve`` as its users run it: a process of its own, with the engine in a process of that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import psutil

from tests.sampling.conftest import quiet_vllm
from tests.serving.conftest import ROOT

START_SEC = 300


@dataclass
class Command:
    """A running server; ``said`` is what it wrote to standard error so far."""

    process: subprocess.Popen
    said: list[str] = field(default_factory=list)
    url: str = ""

    def wait_for(self, pattern: str, seconds: float = START_SEC) -> re.Match:
        until = time.monotonic() + seconds
        while True:
            if (found := re.search(pattern, "".join(self.said))) is not None:
                return found
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {''.join(self.said)[-3000:]}"
            assert time.monotonic() < until, "".join(self.said)[-3000:]
            time.sleep(0.1)

    def engine(self) -> psutil.Process:
        """The process that holds the engine."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        (engine,) = [one for one in children if "EngineCore" in " ".join(one.cmdline())]
        return engine

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)


@contextmanager
def serve(models, *flags, **environment):
    """Run the command on the models with a free port; yields once it listens."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    quiet_vllm(own)
    own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    argv = [
        sys.executable, "-m", "vgf_llm.cli", "serve", "--model_name_or_path", models.model_name_or_path,
        "--reward_model", models.reward_model, "--device", "cpu", "--port", "0", "--served_name", "tiny",
        "--top_k", "12", "--max_new_tokens", "8", "--engine.kv_cache_gib", "0.05", "--engine.eager", "true", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(argv, cwd=ROOT, env=own, stderr=subprocess.PIPE, text=True)
    command = Command(process)
    reader = threading.Thread(target=lambda: command.said.extend(process.stderr), daemon=True)
    reader.start()
    try:
        command.url = command.wait_for(r"at (http://127\.0\.0\.1:\d+)/v1").group(1)
        yield command
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
