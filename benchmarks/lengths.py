"""Memory, processor time and fidelity against the length of a response.

    python -m benchmarks.lengths --reward_model outputs/smollm2_dialogue/reward [--record]

For each length a process of its own writes eight responses of so many tokens to one prompt (no token ends them) and
gives processor seconds of sampling, of scoring, of a flow step with the exact gradient, of a pass of ``prior``, and of
one-pass sampling with the reward model's lookahead; the peak of resident memory; and the gradient's fidelity on these
responses. ``seconds_per_token`` divides by the tokens: what grows in it is attention's share. The last line of standard
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import check_writable, write_json_atomic

RECORD = "docs/results/lengths.json"
LENGTHS, TEXTS, PROMPTS_OF_FIDELITY, SUBSTITUTIONS = (32, 64, 128, 256), 8, 6, 60
_PROMPTS = "recipes/smollm2_sentiment/data/prompts_validation.jsonl"
_NO_TOKEN = -1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every length in a process of its own."""
    arguments = _arguments(argv)
    if arguments.length:
        print(json.dumps(measure(arguments.reward_model, arguments.length)))
        return 0
    if arguments.record:
        check_writable(str(Path(RECORD).parent))
    found = {}
    for length in arguments.lengths:
        command = [sys.executable, "-m", "benchmarks.lengths", "--reward_model", arguments.reward_model]
        done = subprocess.run([*command, "--length", str(length)], stdout=subprocess.PIPE, text=True, check=True)
        found[str(length)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{length} tokens: {found[str(length)]}", file=sys.stderr, flush=True)
    command_line = "python -m benchmarks.lengths " + " ".join(sys.argv[1:] if argv is None else argv)
    record = {"lengths": found, "texts": TEXTS, "hardware": hardware(), "command": command_line}
    if arguments.record:
        write_json_atomic(Path(RECORD), record)
    print(json.dumps(record))
    return 0


def measure(reward_model: str, length: int) -> dict[str, Any]:
    """Return the figures of one length.

    Args:
        reward_model: Folder of a reward model in the base's token space.
        length: Tokens of every response.
    """
    import torch

    from reward_models.fidelity import gradient_fidelity, reference_shortlist
    from reward_models.loading import load_reward_model
    from reward_models.lookahead import Lookahead
    from vgf_llm.answering.assemble import make_policy
    from vgf_llm.answering.implicit_policy import ImplicitPolicy
    from vgf_llm.data.prompts import encode_prompt, load_prompts
    from vgf_llm.flow.budget import TransportBudget
    from vgf_llm.models.loading import load_causal_lm, load_tokenizer
    from vgf_llm.settings import SamplingSettings
    from vgf_llm.text.noise import row_seeds
    from vgf_llm.text.reference import TorchReference
    from vgf_llm.text.sampler import ReferenceSampler
    from vgf_llm.text.stream import Steering, StreamSampler

    torch.set_num_threads(1)
    tokenizer, model = load_tokenizer(), load_causal_lm(dtype=torch.float32)
    value = load_reward_model(reward_model, tokenizer=tokenizer, dtype=torch.float32)
    reference = TorchReference(model, SamplingSettings(max_new_tokens=length), (_NO_TOKEN,), tokenizer.pad_token_id)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in load_prompts(_PROMPTS)[:PROMPTS_OF_FIDELITY]]
    seeds_BN = row_seeds(0, [0], TEXTS)
    loaded_mib = _resident_mib()
    sampler = ReferenceSampler(reference)
    texts = sampler.sample(prompts[:1], seeds_BN)
    policy = make_policy(ImplicitPolicy, reference, value, TransportBudget(nats=2.0), length_unit=1.0)
    stream = StreamSampler(reference, Lookahead(value), Steering(2.0, 1.0))
    prefix = value.prefix(prompts[:1])
    stages: dict[str, Callable[[], object]] = {
        "sample": lambda: sampler.sample(prompts[:1], seeds_BN),
        "score": lambda: value.score(prefix, texts.tokens_BNT, texts.mask_BNT),
        "flow_step": lambda: policy.transport(prefix, texts),
        "prior_after_sampling": lambda: policy.improve(texts, seeds_BN),
        "stream_lookahead": lambda: stream.stream(prompts[:1], seeds_BN),
    }
    seconds = {name: _processor_seconds(run) for name, run in stages.items()}
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    samples = sampler.sample(prompts, row_seeds(1, list(range(len(prompts))), 1))
    shortlist = reference_shortlist(model, prompts, samples.tokens_BNT, 30, tokenizer.pad_token_id)
    fidelity = gradient_fidelity(
        value, prompts, samples.tokens_BNT, samples.mask_BNT, shortlist, substitutions=SUBSTITUTIONS
    )
    return {
        "seconds": {name: round(found, 3) for name, found in seconds.items()},
        "seconds_per_token": {name: round(found / length / TEXTS, 5) for name, found in seconds.items()},
        "peak_mib": peak_mib,
        "above_loaded_mib": peak_mib - loaded_mib,
        "fidelity": [round(x, 3) for x in (fidelity.spearman, fidelity.low, fidelity.high)],
    }


def _processor_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _resident_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description="Cost and fidelity by length.")
    parser.add_argument("--reward_model", required=True, help="folder of a reward model in the base's token space")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of a response")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD} too")
    parser.add_argument("--length", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
