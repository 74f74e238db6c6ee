"""What a flow step costs: against the bare model, against no prompt cache, and in memory as the steps grow.

Three ratios, measured in one process on a reward model with random weights of a real shape:

    flow_step_over_bare          one `transport` step (autograd_value, rbf kernel on pooled features, normalised step)
                                 over a bare forward + backward to the same response embeddings by the same model with
                                 the same cached prefix, whose cache is copied before the clock starts
    prefix_cache_speedup         the same step with prompt and response run together, over the one with cached prefix
    peak_memory_growth_per_step  (peak of 16 steps - peak of 2 steps) / 14, over the peak of one step; a peak is what
                                 the transport allocates on top of weights and prefix (CPU: all tensor allocations,
                                 summed up from torch's memory profile; CUDA: the allocator's own peak)

The arms of a repetition run one after the other in turning order, and a ratio is taken within a repetition; medians
over the repetitions are reported with their quartiles, in wall time. On a CPU the same ratios in processor time stand
beside them: they show what other work on the machine did to the wall clock. The last line of standard output is one
JSON object. On a machine that is shared, set OMP_WAIT_POLICY=passive: threads that spin at barriers while another
process holds their core make every wall time a matter of luck.

    python -m benchmarks.transport [--record] [--shape smollm2|pythia-2.8b|tiny] [--device cpu|cuda] [--dtype float32]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from reward_models.modelling import RewardModel, RewardModelConfig
from vgf_llm.flow import TransportBudget, ValueGradient, autograd_value, transport
from vgf_llm.machine.facts import device_facts
from vgf_llm.machine.precision import choose_dtype
from vgf_llm.models.prefix import PromptPrefix
from vgf_llm.runs.files import check_writable, write_json_atomic

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "layers": 10,  # of 30
        "dtype": "float32",
        "body": {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
        },
    },
    "pythia-2.8b": {
        "layers": 32,
        "dtype": "auto",
        "body": {
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    },
    "tiny": {
        "layers": 2,
        "dtype": "float32",
        "body": {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
        },
    },
}
MEMORY_STEPS = (1, 2, 16)


class Bench:
    """One model, its prompts and responses, and the three ways to take a step."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Builds the model with random weights (seed 0) and caches the prompts."""
        torch.manual_seed(0)
        B, N, P, T = arguments.prompts, arguments.particles, arguments.prompt_tokens, arguments.response_tokens
        shape = SHAPES[arguments.shape]
        body = {**shape["body"], "num_hidden_layers": arguments.layers, "max_position_embeddings": max(2048, P + T)}
        with torch.device(arguments.device):
            self.model = RewardModel(RewardModelConfig(body_config=body, pad_token_id=0)).freeze()
        self.model.body.to(getattr(torch, arguments.dtype))
        generator = torch.Generator().manual_seed(1)
        prompts_BP = torch.randint(1, body["vocab_size"], (B, P), generator=generator)
        tokens_BNT = torch.randint(1, body["vocab_size"], (B, N, T), generator=generator).to(arguments.device)
        self.mask_BNT = torch.ones_like(tokens_BNT, dtype=torch.bool)
        self.particles_BNTD = self.model.embed(tokens_BNT)
        self.prompt_RPD = self.model.embed(prompts_BP.to(arguments.device)).repeat_interleave(N, 0)
        self.prefix: PromptPrefix = self.model.prefix(prompts_BP.tolist())
        self.prefix_rows = self.prefix.expand(N)

    def _move(self, value_gradient: ValueGradient, steps: int) -> None:
        budget = TransportBudget(steps=steps, step_size=0.1, step="normalised", kernel="rbf")
        transport(
            self.particles_BNTD, value_gradient, budget, mask=self.mask_BNT, features=lambda u_BNTD: u_BNTD.mean(2)
        )

    def flow(self, steps: int = 1) -> None:
        """Flow steps through the library, prompts cached."""
        self._move(autograd_value(lambda u_BNTD: self.model.score(self.prefix, u_BNTD, self.mask_BNT)), steps)

    def flow_without_cache(self) -> None:
        """One flow step that runs prompt and response together."""

        def value(u_BNTD: Tensor) -> Tensor:
            B, N, T, D = u_BNTD.shape
            return self.model(inputs_embeds=torch.cat([self.prompt_RPD, u_BNTD.reshape(B * N, T, D)], 1)).reshape(B, N)

        self._move(autograd_value(value), 1)

    def bare(self, cache: transformers.Cache) -> None:
        """Forward and backward to the response embeddings, without this library: body, last token, head, sum."""
        B, N, T, D = self.particles_BNTD.shape
        leaf_RTD = self.particles_BNTD.detach().reshape(B * N, T, D).requires_grad_(True)
        hidden_RTD = self.model.body(inputs_embeds=leaf_RTD, past_key_values=cache, use_cache=True).last_hidden_state
        self.model.head(hidden_RTD[:, -1].float()).sum().backward()


def timed_ratios(bench: Bench, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Times the three arms in turning order.

    Args:
        bench: What to time.
        repetitions: Measured rounds >= 1, after one that is not counted.

    Returns:
        For the clocks "wall" and "processor": seconds of each arm and both ratios, a number a repetition.
    """
    arms = ("flow", "bare", "flow_without_cache")
    clocks: dict[str, dict[str, list[float]]] = {clock: {arm: [] for arm in arms} for clock in ("wall", "processor")}
    for repetition in range(-1, repetitions):
        for index in range(len(arms)):
            arm = arms[(index + repetition) % len(arms)]
            inputs = [bench.prefix_rows.cache()] if arm == "bare" else []
            seconds = _seconds(lambda arm=arm, inputs=inputs: getattr(bench, arm)(*inputs))
            for clock, elapsed in zip(clocks, seconds, strict=True):
                if repetition >= 0:
                    clocks[clock][arm].append(elapsed)
    for taken in clocks.values():
        taken["flow_step_over_bare"] = [a / b for a, b in zip(taken["flow"], taken["bare"], strict=True)]
        taken["prefix_cache_speedup"] = [a / b for a, b in zip(taken["flow_without_cache"], taken["flow"], strict=True)]
    return clocks


def peak_bytes(work: Callable[[], None]) -> int:
    """Peak of live tensor bytes that `work` allocates on top of what lived before."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the figures of the JSON line."""
    bench = Bench(arguments)
    clocks = timed_ratios(bench, arguments.repetitions)
    if arguments.device.startswith("cuda"):
        del clocks["processor"]
    peaks = {steps: peak_bytes(lambda steps=steps: bench.flow(steps)) for steps in MEMORY_STEPS}
    one, few, many = MEMORY_STEPS
    return {
        "flow_step_over_bare": round(statistics.median(clocks["wall"]["flow_step_over_bare"]), 4),
        "prefix_cache_speedup": round(statistics.median(clocks["wall"]["prefix_cache_speedup"]), 3),
        "peak_memory_growth_per_step": round((peaks[many] - peaks[few]) / (many - few) / peaks[one], 6),
        "spread": {
            "repetitions": arguments.repetitions,
            "peak_memory_mib": {f"{steps}_steps": round(peak / 2**20, 2) for steps, peak in peaks.items()},
            **{f"{clock}_time": {n: _quartiles(v) for n, v in taken.items()} for clock, taken in clocks.items()},
        },
        "setting": {
            "shape": arguments.shape,
            "layers": arguments.layers,
            "dtype": arguments.dtype,
            "prompts": arguments.prompts,
            "particles": arguments.particles,
            "prompt_tokens": arguments.prompt_tokens,
            "response_tokens": arguments.response_tokens,
        },
        "hardware": device_facts(
            arguments.device, ("cores", "threads", "load_average", "omp_wait_policy"), on_gpu=("threads",)
        ),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": " ".join(["python -m benchmarks.transport", *sys.argv[1:]]),
    }


def _seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds and processor seconds (all threads) of `work`."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronise()
    wall, processor = time.perf_counter(), time.process_time()
    work()
    synchronise()
    return time.perf_counter() - wall, time.process_time() - processor


def _quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(value, 4) for value in quartiles]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given comes from the shape."""
    parser = argparse.ArgumentParser(description="Cost of a flow step, as ratios measured in one run.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2", help="model shape, random weights")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the shape's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the body (default: the shape's)"
    )
    parser.add_argument("--prompts", type=int, default=1, help="prompts B")
    parser.add_argument("--particles", type=int, default=8, help="responses a prompt N")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="prompt length P")
    parser.add_argument("--response-tokens", type=int, default=48, help="response length T")
    parser.add_argument("--repetitions", type=int, default=9, help="measured rounds, each of all arms")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--record", action="store_true", help="write docs/results/transport[_<shape>].json too")
    arguments = parser.parse_args(argv)
    arguments.layers = arguments.layers or SHAPES[arguments.shape]["layers"]
    arguments.dtype = choose_dtype(arguments.dtype or SHAPES[arguments.shape]["dtype"], arguments.device)
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measures, records if asked, and prints the JSON line."""
    arguments = parse(argv)
    folder = check_writable("docs/results") if arguments.record else Path()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    if arguments.record:
        name = "transport" if arguments.shape == "smollm2" else f"transport_{arguments.shape}"
        write_json_atomic(folder / f"{name}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
