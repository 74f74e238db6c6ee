"""What vLLM costs and saves: tokens a second against transformers, and transported against plain decoding.

    python -m benchmarks.sampling [--record]
    python -m benchmarks.sampling --shape tiny --tokens 8 --counts 1 4 --repetitions 2

Every arm writes the same number of tokens after the same prompts (no token ends a text), the arms take turns, and the
ratios are taken turn by turn; their median is given, and their range over the turns:

``vllm_over_transformers_tokens_per_sec``  vLLM's own sampler against ``generate`` of transformers, both at top-k 50,
for each number of sequences.
``transported_over_plain_time``  the ``prior`` decoder's tilted distribution in the engine, its plans made and followed
included, against the engine's own sampler, at the number of sequences nearest to 32.

The engine runs in this process; resident memory is read after each start. ``--record`` writes
docs/results/sampling.json; the last line of standard output is the same JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from vgf_llm.engines.engine import EngineRequest
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.engines.vllm_engine import VLLMEngine
from vgf_llm.engines.vllm_env import ERRORS_ALONE, IN_THIS_PROCESS, set_defaults
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.machine.facts import facts
from vgf_llm.machine.precision import choose_dtype
from vgf_llm.models.loading import load_causal_lm, load_skeleton, load_tokenizer, resolved_name
from vgf_llm.runs.files import write_json_atomic
from vgf_llm.settings import EngineSettings, SamplingSettings
from vgf_llm.text import Move, Moved, PriorDecoder, Responses, row_seeds
from vgf_llm.text.sampler import ReferenceSampler

_NEAREST_TO = 32
_TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
_NATS = 4.0
_RECORD = "docs/results/sampling.json"


@dataclass(frozen=True)
class Models:
    """A model in both backends, its prompts, and the distribution."""

    model: PreTrainedModel
    engine: VLLMEngine
    reference: EngineReference
    prompts: list[list[int]]
    sampling: SamplingSettings
    memory: dict[str, int]

    def generate(self, count: int) -> None:
        """Write with transformers."""
        prompts = self.rows(count)
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        length = self.sampling.max_new_tokens
        self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            do_sample=True,
            top_k=self.sampling.top_k,
            max_new_tokens=length,
            min_new_tokens=length,
            pad_token_id=0,
            eos_token_id=None,
        )

    def plain(self, count: int) -> None:
        """Write with the engine's own sampler."""
        length = self.sampling.max_new_tokens
        rows = enumerate(self.rows(count))
        self.engine.run([EngineRequest(prompt, length, sampling=self.sampling, seed=seed) for seed, prompt in rows])

    def transported(self, move: Move) -> None:
        """Write with the tilted distribution in the engine."""
        decoder = PriorDecoder(self.reference, self.model.get_input_embeddings().weight.detach())
        decoder.decode(decoder.prepare(move.responses.prompts), move)

    def rows(self, count: int) -> list[list[int]]:
        """Return a prompt a sequence."""
        return [self.prompts[i % len(self.prompts)] for i in range(count)]

    def move(self, count: int) -> Move:
        """Return drawn responses with a random displacement of each token, one response a row."""
        prompts = self.rows(count)
        seeds_BN = row_seeds(0, list(range(count)), 1)
        responses = ReferenceSampler(self.reference).sample(prompts, seeds_BN)
        width = self.model.get_input_embeddings().weight.shape[1]
        displacement = torch.randn((*responses.tokens_BNT.shape, width), generator=torch.Generator().manual_seed(0))
        return _move(responses, displacement, seeds_BN)


def _move(responses: Responses, displacement_BNTD: Tensor, seeds_BN: Tensor) -> Move:
    zeros_BN = torch.zeros(seeds_BN.shape)
    moved = Moved(displacement_BNTD, zeros_BN, zeros_BN)
    return Move(
        responses=responses,
        moved=moved,
        budget=TransportBudget(nats=_NATS),
        nats=_NATS,
        seeds_BN=seeds_BN,
        coupled_BN=torch.ones(seeds_BN.shape, dtype=torch.bool),
        flow=lambda other: moved,
        flow_passes=0,
        score=lambda other: zeros_BN,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = _arguments(argv)
    set_defaults(os.environ, IN_THIS_PROCESS, ERRORS_ALONE)
    with tempfile.TemporaryDirectory(prefix="sampling.") as scratch:
        models = _load(arguments, Path(scratch))
        try:
            figures = measure(models, arguments.counts, arguments.repetitions)
        finally:
            models.engine.close()
    setting = {key: getattr(arguments, key) for key in ("shape", "tokens", "counts", "repetitions", "eager", "device")}
    machine = facts("cores", "threads", "processor", *(["gpu"] if arguments.device == "cuda" else []))
    command = f"python -m benchmarks.sampling {' '.join(sys.argv[1:] if argv is None else argv)}".strip()
    record = {**figures, "memory_mib": models.memory, "setting": setting, "hardware": machine, "command": command}
    if arguments.record:
        write_json_atomic(_RECORD, record)
    print(json.dumps(record))


def measure(models: Models, counts: Sequence[int], repetitions: int) -> dict:
    """Time the arms in turn and return the ratios."""
    speedups, rates, transported, spread = {}, {}, {}, {}
    nearest = min(counts, key=lambda count: abs(count - _NEAREST_TO))
    for count in counts:
        arms: dict[str, Callable[[], None]] = {
            "transformers": lambda count=count: models.generate(count),
            "vllm": lambda count=count: models.plain(count),
        }
        if count == nearest:
            move = models.move(count)
            arms["transported"] = lambda move=move: models.transported(move)
        seconds = _in_turn(arms, repetitions)
        tokens = count * models.sampling.max_new_tokens
        ratios = [here / there for here, there in zip(seconds["transformers"], seconds["vllm"], strict=True)]
        speedups[str(count)], spread[str(count)] = _median_and_range(ratios)
        rates[str(count)] = {name: round(tokens / statistics.median(one), 1) for name, one in seconds.items()}
        print(f"{count} sequences: {rates[str(count)]} tokens a second", file=sys.stderr)
        if count == nearest:
            ratios = [moved / plain for moved, plain in zip(seconds["transported"], seconds["vllm"], strict=True)]
            ratio, spread["transported"] = _median_and_range(ratios)
            transported = {"transported_over_plain_time": ratio}
    return {
        "vllm_over_transformers_tokens_per_sec": speedups,
        **transported,
        "range_over_turns": spread,
        "tokens_per_sec": rates,
    }


def _median_and_range(ratios: Sequence[float]) -> tuple[float, list[float]]:
    return round(statistics.median(ratios), 3), [round(min(ratios), 3), round(max(ratios), 3)]


def _in_turn(arms: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each arm in every turn but the first, in which all arms run after each other."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repetitions + 1):
        for name, run in arms.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _load(arguments: argparse.Namespace, scratch: Path) -> Models:
    sampling = SamplingSettings(top_k=50, max_new_tokens=arguments.tokens)
    memory = {"before": _resident_mib()}
    if arguments.shape == "tiny":
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=128, num_hidden_layers=2, max_position_embeddings=256, **_TINY)
        LlamaForCausalLM(config).save_pretrained(scratch)
        words = WordLevel({f"word{i}": i for i in range(config.vocab_size)}, unk_token="word0")
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="word2").save_pretrained(scratch)
        name, prompts = str(scratch), [[1, 10, 11, 12], [1, 20, 30]]
    else:
        name, tokenizer = resolved_name("default"), load_tokenizer()
        texts = [f"Write one sentence about {thing}." for thing in ("the sea", "a chair", "rain", "my old bicycle")]
        chats = [[{"role": "user", "content": text}] for text in texts]
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    model = load_causal_lm(name, dtype=arguments.dtype, device=arguments.device)
    model.generation_config.eos_token_id = None
    memory["transformers"] = _resident_mib()
    settings = EngineSettings(kv_cache_gib=arguments.kv_cache_gib, eager=arguments.eager)
    table_VD = model.get_input_embeddings().weight
    engine = VLLMEngine(name, settings, table_VD=table_VD, dtype=arguments.dtype, max_length=arguments.tokens + 128)
    memory["transformers and vllm"] = _resident_mib()
    reference = EngineReference(engine, load_skeleton(name), sampling, (), 0, arguments.device)
    return Models(model, engine, reference, prompts, sampling, memory)


def _resident_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2", "tiny"), default="smollm2", help="the model")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that every sequence is written")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 32, 64], help="sequences side by side")
    parser.add_argument("--repetitions", type=int, default=3, help="timed turns of each arm")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32", help="parameter dtype")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where transformers runs")
    parser.add_argument("--kv-cache-gib", type=float, default=0.5, help="memory for keys and values of the engine")
    parser.add_argument("--record", action="store_true", help=f"write {_RECORD} too")
    parser.add_argument("--eager", action="store_true", help="start the engine without compiling the model")
    arguments = parser.parse_args(argv)
    arguments.dtype = choose_dtype(arguments.dtype, arguments.device)
    return arguments


if __name__ == "__main__":
    main()
