"""vLLM's environment variables that this package sets or reads, each with the reason. Imports nothing of vLLM.

vLLM reads its environment when it is imported and when an engine starts. A group is set by :func:`set_defaults`, which
leaves alone what the user has set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

OLD_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""The newer runner has another interface for logits processors, which pick the tokens of plans."""

WARNINGS_ON_STDERR = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the command's own
    "VLLM_LOGGING_LEVEL": "WARNING",
}

NO_COMPILED_CACHE = {"VLLM_USE_AOT_COMPILE": "0"}
"""Without a GPU what is compiled ahead of time cannot be read back, and is made anew at every start."""

SPAWNED_WORKERS = {"VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
"""For a server: an engine that is started again must not fork a process with threads."""

IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine runs in this process: it starts in seconds, and its memory and its errors are this process's."""

IN_OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""The engine runs in a process of its own, as users have it: it can be watched, measured and killed apart."""

UNBOUND_THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""On a CPU vLLM binds its threads to cores, which is slow where others use the same cores."""

ERRORS_ALONE = {"VLLM_LOGGING_LEVEL": "ERROR"}
"""Tests and benchmarks print figures; warnings of every start would hide them."""

NO_USAGE_STATS = {"VLLM_NO_USAGE_STATS": "1"}
"""Nothing is reported to anyone."""

ADAPTERS_AT_RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""A server must have it set to take adapters while it runs."""

WEIGHTS_AT_RUNTIME = {"VLLM_SERVER_DEV_MODE": "1"}
"""A server must have it set to take whole weights while it runs."""

_API_KEY = "VLLM_API_KEY"


def set_defaults(environment: MutableMapping[str, str], *groups: Mapping[str, str]) -> None:
    """Set the variables of some groups where they are not set."""
    for group in groups:
        for name, value in group.items():
            environment.setdefault(name, value)


def prepare_start(has_gpu: bool) -> None:
    """Set what an engine that starts in this process's charge needs; to be called before vLLM is imported."""
    os.environ.update(OLD_RUNNER)
    set_defaults(os.environ, WARNINGS_ON_STDERR, *([] if has_gpu else [NO_COMPILED_CACHE]))


def runs_in_this_process() -> bool:
    """Return whether the environment asks for an engine inside the process that starts it."""
    ((name, value),) = IN_THIS_PROCESS.items()
    return os.environ.get(name) == value


def api_key() -> str | None:
    """Return the key that a server asks for, or None where none is set: a server reads the same variable."""
    return os.environ.get(_API_KEY) or None


def stated(group: Mapping[str, str]) -> str:
    """Return a group as a command line states it: ``NAME=value``."""
    return " ".join(f"{name}={value}" for name, value in group.items())
