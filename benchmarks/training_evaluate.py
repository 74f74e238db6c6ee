"""What a fine-tuned policy is worth and how far it went: gold, reward, KL to the base, likelihood under the base.

    python -m benchmarks.training_evaluate --adapter outputs/training/grpo/mark_4 --top_k 50

Every adapter is measured alike, whoever trained it, and ``base`` stands for the model without one. Per prompt:

    gold, reward   mean over ``num_samples`` of the policy's own responses under the sampling distribution
    nll            of these responses under the base, nats a token, untruncated at temperature 1
    kl             mean over as many further responses, drawn from the policy untruncated at temperature 1, of
                   sum_t log pi(y_t) - log p(y_t): an unbiased estimate of KL(pi || p) of a response of at most
                   max_new_tokens tokens. Its noise is that of the samples, and single terms may be negative

Noise depends on prompt, seed and position alone, so policies share it and their differences are paired. The figures go
to ``evaluation_<prompt file>.json`` in the adapter's folder (the base's: in output_dir), one number a prompt; what is
there already under the same settings is kept. The last line of standard output is one JSON object of means; with
``--record`` the summary, paired differences from the base with 95% intervals over prompts and some responses among it,
goes to docs/results/<name>.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgf_llm.cli import run_main
from vgf_llm.console.progress import track
from vgf_llm.data.contents import contents
from vgf_llm.errors import ModelError
from vgf_llm.machine.precision import with_dtype
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import dump, parse

if TYPE_CHECKING:
    from vgf_llm.answering.pipeline import Pipeline

BASE = "base"
MEASURES = ("gold", "reward", "nll", "kl")
_KL_STREAM = 0x40000
_SHOWN = 20


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, on which prompts."""

    adapter: list[str] = field(default_factory=lambda: [BASE])
    """Folders of PEFT adapters; "base" is the model without one."""
    output_dir: str = "outputs/training"
    """Folder for the base's figures."""
    prompts: str = "recipes/smollm2_sentiment/data/prompts_test.jsonl"
    """Prompt file."""
    num_prompts: int | None = None
    """Prompts used, from the first; all when unset."""
    gold: str = "vader_compound"
    """Held-out scorer: a function of reward_models.functions or "module:function"."""
    num_samples: int = 4
    """Responses a prompt, at least 1; as many again for the KL."""
    evaluation_seed: int = 1000
    """Seed of the samples; another one than that of training."""
    batch_prompts: int = 10
    """Prompts a batch, at least 1."""
    record: str | None = None
    """Also write the summary to docs/results/<record>.json."""

    def __post_init__(self) -> None:
        """Validate ranges.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        if not self.adapter:
            raise ValueError(f'adapter must name a folder or "{BASE}", got {self.adapter}')
        for key in ("num_samples", "batch_prompts"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")

    def result_path(self, adapter: str) -> Path:
        """Return where the figures of an adapter go."""
        folder = Path(self.output_dir) if adapter == BASE else Path(adapter)
        return folder / f"evaluation_{Path(self.prompts).stem}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings, models, sampling = parse(
        EvaluationSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="python -m benchmarks.training_evaluate",
        description="Measure fine-tuned policies: gold, reward, KL to the base, likelihood under the base.",
    )
    results = run(settings, with_dtype(models), sampling)
    if settings.record:
        write_json_atomic(Path("docs/results") / f"{settings.record}.json", summary(results))
    print(json.dumps({name: means(result) for name, result in results.items()}))
    return 0


def run(settings: EvaluationSettings, models: ModelSettings, sampling: SamplingSettings) -> dict[str, dict[str, Any]]:
    """Measure every adapter that has not been measured under these settings, and return all results.

    Raises:
        ModelError: A folder holds no adapter.
        VGFError: Models or prompts are unusable.
    """
    identity = _identity(settings, models, sampling)
    for adapter in settings.adapter:
        if adapter != BASE and not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(f"'{adapter}' holds no adapter (adapter_config.json is missing); name a folder that does")
    results = {name: _finished(settings.result_path(name), identity | _weights(name)) for name in settings.adapter}
    remaining = [name for name, result in results.items() if result is None]
    if remaining:
        from vgf_llm.answering.pipeline import load_pipeline

        pipeline = load_pipeline(models, sampling)
        for name in remaining:
            with policy_of(pipeline, name) as policy:
                figures = measure(settings, pipeline, policy, sampling, name)
            result = {"settings": identity | _weights(name), "prompts": figures}
            check_writable(settings.result_path(name).parent)
            write_json_atomic(settings.result_path(name), result)
            results[name] = result
    return {name: result for name, result in results.items() if result is not None}


def means(result: dict[str, Any]) -> dict[str, float]:
    """Return each measure's mean over the prompts."""
    rows = result["prompts"]
    return {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in MEASURES}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return means with intervals of every policy, and its paired differences from the base where that is there."""
    from dataclasses import asdict

    from vgf_llm.machine.facts import hardware
    from vgf_llm.statistics.intervals import bootstrap_mean

    found: dict[str, Any] = {"hardware": hardware()}
    base = results.get(BASE)
    for name, result in results.items():
        rows = result["prompts"]
        entry = {key: asdict(bootstrap_mean([row[key] for row in rows])) for key in MEASURES}
        if base is not None and name != BASE:
            pairs = list(zip(rows, base["prompts"], strict=True))
            for key in ("gold", "reward", "nll"):
                entry[f"{key} - base"] = asdict(bootstrap_mean([own[key] - other[key] for own, other in pairs]))
        samples = sum(row["kl_samples"] for row in rows)
        shown = [row["response"] for row in rows[:_SHOWN]]
        found[name] = entry | {"kl_samples": samples, "responses": shown, "settings": result["settings"]}
    return found


@contextlib.contextmanager
def policy_of(pipeline: Pipeline, adapter: str) -> Iterator[Any]:
    """Put an adapter on the base for as long as the context lasts; yields the PEFT model, or None for the base."""
    if adapter == BASE:
        yield None
        return
    from peft import PeftModel

    policy = PeftModel.from_pretrained(pipeline.reference.model, adapter).eval()
    try:
        yield policy
    finally:
        policy.unload()


def measure(
    settings: EvaluationSettings, pipeline: Pipeline, policy: Any, sampling: SamplingSettings, name: str
) -> list[dict[str, Any]]:
    """Return one row a prompt: the measures, and one of the responses.

    Args:
        settings: Prompts, scorer and samples.
        pipeline: The base with its reward model; the adapter of ``policy`` is on it.
        policy: The PEFT model, or None for the base.
        sampling: The distribution of the samples that are scored.
        name: For the progress.
    """
    from reward_models.functions import call_function, load_function
    from vgf_llm.answering.pipeline import encode_prompts, prompt_text
    from vgf_llm.data.prompts import load_prompts
    from vgf_llm.evaluation.measures import nll_per_token
    from vgf_llm.text import TorchReference, row_seeds
    from vgf_llm.text.noise import combine_seeds
    from vgf_llm.text.sampler import ReferenceSampler

    prompts = load_prompts(settings.prompts, limit=settings.num_prompts)
    ids, texts = encode_prompts(pipeline, prompts), [prompt_text(prompt) for prompt in prompts]
    gold = load_function(settings.gold)
    of = pipeline.reference
    untruncated = SamplingSettings(max_new_tokens=sampling.max_new_tokens, top_k=0)
    rows: list[dict[str, Any]] = []
    for start in track(range(0, len(ids), settings.batch_prompts), name):
        indices = list(range(start, min(start + settings.batch_prompts, len(ids))))
        batch = [ids[i] for i in indices]
        seeds_BN = row_seeds(settings.evaluation_seed, indices, settings.num_samples)
        distribution = TorchReference(of.model, sampling, of.eos_ids, of.pad_id)
        free = TorchReference(of.model, untruncated, of.eos_ids, of.pad_id)
        own = ReferenceSampler(distribution).sample(batch, seeds_BN)
        wide = ReferenceSampler(free).sample(batch, combine_seeds(seeds_BN, _KL_STREAM))
        policy_logps_BNT = free.logps(free.prefix(batch), wide)
        with policy.disable_adapter() if policy is not None else contextlib.nullcontext():
            base = TorchReference(of.model, untruncated, of.eos_ids, of.pad_id)
            prefix = base.prefix(batch)
            nll_BN = nll_per_token(base, prefix, own)
            kl_BN = (policy_logps_BNT - base.logps(prefix, wide)).sum(-1)
        values_BN = pipeline.value.score(pipeline.value.prefix(batch), own.tokens_BNT, own.mask_BNT)
        answers = own.texts(pipeline.tokenizer)
        for b, index in enumerate(indices):
            scores = call_function(gold, [texts[index]] * settings.num_samples, answers[b])
            rows.append(
                {
                    "index": index,
                    "gold": round(sum(scores) / len(scores), 5),
                    "reward": round(float(values_BN[b].mean()), 5),
                    "nll": round(float(nll_BN[b].mean()), 5),
                    "kl": round(float(kl_BN[b].mean()), 5),
                    "kl_samples": settings.num_samples,
                    "response": answers[b][0],
                }
            )
    return rows


def _identity(settings: EvaluationSettings, models: ModelSettings, sampling: SamplingSettings) -> dict[str, Any]:
    """Return what decides the figures."""
    config = dump(settings, models, sampling)
    for key in ("adapter", "output_dir", "batch_prompts", "record"):
        config.pop(key)
    return {**config, "contents": contents(settings.prompts, models.reward_model)}


def _weights(adapter: str) -> dict[str, Any]:
    """Return the fingerprint of an adapter's weights: figures of an earlier adapter are not its own."""
    if adapter == BASE:
        return {}
    return {"adapter": list(contents(str(Path(adapter) / "adapter_model.safetensors"), None).values())}


def _finished(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return figures that were measured under the same settings, or None."""
    result = json.loads(path.read_text()) if path.is_file() else None
    return result if result is not None and result.get("settings") == identity else None


if __name__ == "__main__":
    sys.exit(run_main(main))
