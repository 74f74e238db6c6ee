"""Whether transport through vLLM is transport through transformers: the same tokens, or the same statistics.

    python -m benchmarks.sampling_parity --reward_model outputs/smollm2_sentiment/reward [--record]
    python -m benchmarks.sampling_parity --reward_model outputs/smollm2_sentiment/reward --dtype bfloat16 [--record]

Both backends answer the same test prompts with the same seeds, budget and decoder (``prior``); nothing is tuned on
them.

``identical_tokens``  share of places where both wrote the same token, a place that only one reached counted as
different: of the samples, and of the transported texts. From a first difference on, two texts go their own ways.
``gap_nats``  at the first difference of each sample: by how much transformers preferred its token to vLLM's, noise
included; median and largest. A rounding error decides there and nowhere else where this is about the size of one.
``off_the_list`` counts first differences where the token of one is not among the other's top k, and no gap can be told:
the last tokens of the list have changed places there.
``difference``  vLLM minus transformers with 95% paired bootstrap intervals over prompts, each the mean of its seeds:
mean value of the samples and of the transported texts, value of the selected response, and nats that were spent.

With ``--record`` the figures go to docs/results/sampling_parity.json under their dtype. The last line of standard
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy, Outcome
from vgf_llm.answering.pipeline import encode_prompts, load_pipeline
from vgf_llm.data.prompts import load_prompts
from vgf_llm.engines.backend import Backend
from vgf_llm.engines.transformers_backend import TransformersBackend
from vgf_llm.engines.vllm_backend import VLLMBackend
from vgf_llm.engines.vllm_env import ERRORS_ALONE, IN_THIS_PROCESS, set_defaults
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.machine.facts import facts
from vgf_llm.machine.precision import choose_dtype
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.settings import EngineSettings, ModelSettings, SamplingSettings
from vgf_llm.statistics.intervals import bootstrap_mean
from vgf_llm.text import Responses, row_seeds
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.protocols import Reference

_RECORD = "docs/results/sampling_parity.json"
_PADDING = -1


@dataclass(frozen=True)
class Answers:
    """What one backend made of all prompts, once a seed, a batch of them in each outcome, and how long it took."""

    outcomes: list[Outcome]
    num_seeds: int
    seconds: float

    def values(self, name: str) -> list[float]:
        """Return one figure a prompt, the mean over seeds."""
        found = {
            "selected_value": [outcome.selected_values_B for outcome in self.outcomes],
            "sample_value": [outcome.original_values_BN.mean(1) for outcome in self.outcomes],
            "cloud_value": [outcome.transported_values_BN.mean(1) for outcome in self.outcomes],
            "nats": [outcome.nats_BN.mean(1) for outcome in self.outcomes],
        }[name]
        return torch.cat(found).float().view(self.num_seeds, -1).mean(0).tolist()


def answers(arguments: argparse.Namespace, backend: Backend[Reference]) -> tuple[Answers, list[Tensor]]:
    """Answer the prompts with one backend; returns the seeds of each batch too."""
    models = ModelSettings(arguments.model_name_or_path, arguments.reward_model, arguments.dtype, arguments.device)
    sampling = SamplingSettings(max_new_tokens=arguments.max_new_tokens)
    with closing(load_pipeline(models, sampling, backend)) as pipeline:
        prompts = encode_prompts(pipeline, load_prompts(arguments.prompts, "prompt", limit=arguments.num_prompts))
        budget = TransportBudget(nats=arguments.nats)
        policy = make_policy(ImplicitPolicy, pipeline.reference, pipeline.value, budget, gradient=pipeline.gradient)
        batches = [range(start, min(start + 10, len(prompts))) for start in range(0, len(prompts), 10)]
        seeds, outcomes, started = [], [], time.perf_counter()
        for seed in arguments.seeds:
            for batch in batches:
                seeds.append(row_seeds(seed, list(batch), arguments.num_particles))
                outcomes.append(policy([prompts[index] for index in batch], seeds[-1]))
                seconds = time.perf_counter() - started
                print(f"seed {seed}: {batch.stop} of {len(prompts)} prompts after {seconds:.0f} s", file=sys.stderr)
    return Answers(outcomes, len(arguments.seeds), seconds), seeds


def compare(here: Answers, there: Answers, seeds: Sequence[Tensor]) -> dict[str, Any]:
    """Return the figures of two backends' answers to the same prompts under the same seeds."""
    pairs = list(zip(here.outcomes, there.outcomes, strict=True))
    samples = [_both(mine.originals, theirs.originals) for mine, theirs in pairs]
    texts = [_both(mine.transported, theirs.transported) for mine, theirs in pairs]
    gaps = [
        gap
        for (mine, theirs), (here_B, there_B), seeds_BN in zip(samples, pairs, seeds, strict=True)
        for gap in first_gaps(mine, theirs, here_B.originals, there_B.originals, seeds_BN)
    ]
    known = [gap for gap in gaps if gap < math.inf]
    figures = {
        "identical_tokens": {"samples": _identical(samples), "transported": _identical(texts)},
        "differing_responses": {"samples": _differing(samples), "transported": _differing(texts)},
        "responses": sum(len(mine) for mine, _ in samples),
        "gap_nats": {"median": statistics.median(known), "largest": max(known)} if known else None,
        "off_the_list": len(gaps) - len(known),
    }
    for name in ("sample_value", "cloud_value", "selected_value", "nats"):
        mine, theirs = here.values(name), there.values(name)
        estimate = bootstrap_mean([b - a for a, b in zip(mine, theirs, strict=True)])
        figures.setdefault("difference", {})[name] = asdict(estimate) | {"excludes_zero": estimate.excludes_zero}
        figures.setdefault("transformers", {})[name] = sum(mine) / len(mine)
    return figures


def first_gaps(mine_RT: Tensor, theirs_RT: Tensor, mine: Responses, theirs: Responses, seeds_BN: Tensor) -> list[float]:
    """Return, for each sample that differs, how far apart both tokens' scores were where it first does.

    The score is log p + noise, by which the sampler picks; p is the distribution that transformers met there. Infinity
    where one token is not on the other's list, so that it was not the scores that decided.

    Args:
        mine_RT: What transformers wrote, padded with -1.
        theirs_RT: What vLLM wrote.
        mine: What transformers wrote, with its distributions.
        theirs: What vLLM wrote, with its distributions.
        seeds_BN: Of the noise.
    """
    seeds_R, gaps = seeds_BN.flatten(), []
    for row in (mine_RT != theirs_RT).any(-1).nonzero().flatten().tolist():
        t = int((mine_RT[row] != theirs_RT[row]).nonzero()[0])
        ids_K, logps_K = mine.distribution.ids.flatten(0, 1)[row, t], mine.distribution.logps.flatten(0, 1)[row, t]
        scores_K = logps_K + gumbel_noise(seeds_R[row : row + 1].to(ids_K.device), t, ids_K.unsqueeze(0))[0]
        is_theirs_K = ids_K == theirs_RT[row, t]
        is_on_both = is_theirs_K.any() and (theirs.distribution.ids.flatten(0, 1)[row, t] == mine_RT[row, t]).any()
        gaps.append(float(scores_K.max() - scores_K[is_theirs_K].max()) if is_on_both else math.inf)
    return gaps


def _both(mine: Responses, theirs: Responses) -> tuple[Tensor, Tensor]:
    """Return both backends' tokens [R, T] of one length, -1 beyond the end of a response."""
    tokens = [part.tokens_BNT.masked_fill(~part.mask_BNT, _PADDING).flatten(0, 1) for part in (mine, theirs)]
    longest = max(part.shape[1] for part in tokens)
    one, other = (pad(part, (0, longest - part.shape[1]), value=_PADDING) for part in tokens)
    return one, other


def _identical(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    same = sum(int(((mine == theirs) & (mine != _PADDING)).sum()) for mine, theirs in pairs)
    return same / sum(int(((mine != _PADDING) | (theirs != _PADDING)).sum()) for mine, theirs in pairs)


def _differing(pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(int((mine != theirs).any(-1).sum()) for mine, theirs in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, record if asked, and print the JSON line."""
    arguments = _arguments(argv)
    set_defaults(os.environ, IN_THIS_PROCESS, ERRORS_ALONE)
    if arguments.record:
        check_writable(str(Path(_RECORD).parent))
    here, seeds = answers(arguments, TransformersBackend())
    engine = EngineSettings(kv_cache_gib=arguments.kv_cache_gib, eager=True, timeout_sec=900)
    there, _ = answers(arguments, VLLMBackend(engine))
    setting = {key: value for key, value in vars(arguments).items() if key != "record"}
    figures = {
        **compare(here, there, seeds),
        "seconds": {"transformers": round(here.seconds, 1), "vllm": round(there.seconds, 1)},
        "setting": setting,
        "hardware": facts("cores", "threads"),
        "command": f"python -m benchmarks.sampling_parity {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
    }
    if arguments.record:
        path = Path(_RECORD)
        before = json.loads(path.read_text()) if path.is_file() else {}
        write_json_atomic(path, before | {arguments.dtype: figures})
    print(json.dumps(figures))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling_parity", description=__doc__.splitlines()[0])
    parser.add_argument("--reward_model", required=True, help="folder of a trained reward model")
    parser.add_argument("--model_name_or_path", default="default", help="base model")
    parser.add_argument(
        "--prompts", default="recipes/smollm2_sentiment/data/prompts_test.jsonl", help="file with a column prompt"
    )
    parser.add_argument("--num_prompts", type=int, default=30, help="prompts, from the first")
    parser.add_argument("--num_particles", type=int, default=8, help="responses a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="length limit in tokens")
    parser.add_argument("--nats", type=float, default=4.0, help="transport budget a response")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the samples; each answers all prompts")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32", help="of both backends")
    parser.add_argument("--device", default="cpu", help="where transformers and the reward model run")
    parser.add_argument("--kv_cache_gib", type=float, default=0.5, help="memory for keys and values of the engine")
    parser.add_argument("--record", action="store_true", help=f"write {_RECORD} too")
    arguments = parser.parse_args(argv)
    arguments.dtype = choose_dtype(arguments.dtype, arguments.device)
    return arguments


if __name__ == "__main__":
    main()
