"""How to make a reward model's gradient predict what token changes do: variants at equal training cost.

Every variant is trained on the sentiment recipe's pairs (or a part), and measured on responses that the base sampled to
the validation prompts, with 120 one-token substitutions each: Spearman's correlation of predicted and exact change with
its interval over responses, the gain of the eight substitutions ranked first against the true best eight and eight at
random, accuracy on the validation pairs, seconds to train, and what a direction costs beside the forward pass. On
every model the plain gradient is measured, its mean over eight noisy embeddings (two scales), and, where the variant
says so, what is fitted to exact changes in responses to the training prompts: one direction for all tokens (ridge
regression, the control), and secant heads. Seconds are processor time, one thread. Variants and costs:
`benchmarks.fidelity_variants`.

A variant is one file in the work folder; what is there is not run again, and a model in its folder `models` is measured
without training (its seconds are then unknown). The last line of standard output is JSON.

    python -m benchmarks.fidelity [--only "two layers, skip"] [--record] [--threads 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity_variants import Variant, VariantTrainer, variants
from reward_models.assess import score_pairs
from reward_models.fidelity import compare_changes, score_gradient
from reward_models.frame import untrained_model
from reward_models.loading import load_reward_model, reward_model, save_reward_model
from reward_models.modelling import RewardModel
from reward_models.noise import add_embedding_noise
from reward_models.pairs import EncodedPair, PairCollator
from reward_models.secant import direction_scale, secant_gradient
from reward_models.secant_fit import (
    Sampled,
    constant_direction,
    fit_secant_head,
    sample_reference,
    score_substitutions,
    secant_targets,
)
from reward_models.secant_settings import SecantTraining
from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining
from reward_models.train import load_pairs
from vgf_llm.data.prompts import encode_prompt, load_prompts
from vgf_llm.flow.trajectory import ValueGradient
from vgf_llm.models.loading import eos_token_ids, load_causal_lm, load_tokenizer
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.runs.hf_arguments import training_arguments
from vgf_llm.settings import SamplingSettings
from vgf_llm.statistics.intervals import wilson_interval
from vgf_llm.text.reference import TorchReference

DATA = Path("recipes/smollm2_sentiment/data")
SUBSTITUTIONS, RESPONSES_A_PROMPT, SHORTLIST = 120, 2, 30
NOISE_SCALES, NOISY_GRADIENTS = (0.25, 1.0), 8


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all variants share."""

    lm: Any
    tokenizer: Any
    train_pairs: list[EncodedPair]
    held_out: list[EncodedPair]
    fitted_on: Sampled
    unseen: Sampled


def load_bench(work: Path) -> Bench:
    """Load the base model and pairs, and sample responses once (kept in the work folder)."""
    tokenizer, lm = load_tokenizer(), load_causal_lm()
    script = RewardScript(
        train_dataset=str(DATA / "preferences_train.jsonl"),
        eval_dataset=str(DATA / "preferences_validation.jsonl"),
        output_dir=str(work),
        max_response_length=24,
        over_length="truncate",
    )
    train_pairs, held_out, _ = load_pairs(script, tokenizer, seed=0)
    reference = TorchReference(lm, SamplingSettings(), eos_token_ids(lm, tokenizer), tokenizer.pad_token_id)
    sampled = []
    for seed, split in enumerate(("train", "validation")):
        path = work / f"sampled_{split}.pt"
        if not path.exists():
            prompts = [
                encode_prompt(tokenizer, prompt) for prompt in load_prompts(str(DATA / f"prompts_{split}.jsonl"))
            ]
            torch.save(sample_reference(reference, prompts, RESPONSES_A_PROMPT, SHORTLIST, seed), path)
        sampled.append(torch.load(path, weights_only=False))
    return Bench(lm, tokenizer, train_pairs, held_out, *sampled)


def train_variant(bench: Bench, variant: Variant, folder: Path) -> tuple[RewardModel, float]:
    """Train one variant as the recipe does (16 pairs a step); returns it and processor seconds."""
    torch.manual_seed(variant.seed)
    settings = RewardModelSettings(
        num_layers=variant.layers, pooling="mean", input_skip=variant.input_skip, lora_r=variant.lora_r
    )
    training = RewardTraining(
        learning_rate=variant.learning_rate,
        head_learning_rate=1.0e-2,
        per_device_train_batch_size=16,
        max_steps=variant.num_steps,
        logging_steps=20,
        seed=variant.seed,
    )
    model = untrained_model(bench.lm, settings, variant.seed)
    if variant.extra == "linear":
        model.requires_grad_(False).skip_head.requires_grad_(True)
    stride = 1 if variant.pairs is None else len(bench.train_pairs) // variant.pairs
    trainer = VariantTrainer(
        model=model,
        variant=variant,
        args=training_arguments(training, folder),
        settings=training,
        train_dataset=bench.train_pairs[::stride],
        data_collator=PairCollator(bench.tokenizer.pad_token_id),
        processing_class=bench.tokenizer,
    )
    if variant.noise:
        add_embedding_noise(trainer.model, variant.noise, variant.seed)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    model = model.merge_and_unload() if variant.lora_r else model
    model = reward_model(model).freeze()
    save_reward_model(model, folder.parent / "models" / slug(variant))
    return model, seconds


def slug(variant: Variant) -> str:
    """Return the variant's name as a file name."""
    return variant.name.replace(", ", "-").replace(" ", "_")


def noisy_gradient(plain: ValueGradient, scale: float, count: int, seed: int = 0) -> ValueGradient:
    """Return the mean of `count` gradients at u + scale * noise (scale in units of u)."""

    def value_gradient(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values_BN, total = plain(u_BNTD)[0], torch.zeros_like(u_BNTD)
        for _ in range(count):
            total += plain(u_BNTD + scale * torch.randn(u_BNTD.shape, generator=generator))[1]
        return values_BN, total / count

    return value_gradient


def mean_gradient(model: RewardModel, sampled: Sampled) -> Tensor:
    """Return the mean over text tokens of the input gradient, in the head's units 1 / (rms T): one direction [D]."""
    total_D, count, responses = torch.zeros(model.head.in_features), 0, sampled.responses
    for start in range(0, len(responses.prompts), 16):
        batch = slice(start, start + 16)
        prefix, mask_BNT = model.prefix(responses.prompts[batch]), responses.mask_BNT[batch]
        u_BNTD = model.embed(responses.tokens_BNT[batch]).detach()
        gradient_BNTD = score_gradient(model, prefix, mask_BNT)(u_BNTD)[1] / direction_scale(model, mask_BNT)
        found_XD = gradient_BNTD[responses.movable_BNT[batch]]
        total_D, count = total_D + found_XD.sum(0), count + len(found_XD)
    return total_D / count


def measure_variant(bench: Bench, variant: Variant, model: RewardModel) -> dict[str, Any]:
    """Measure accuracy and every direction on held-out responses of unseen prompts."""
    chosen, rejected = score_pairs(model, bench.held_out, bench.tokenizer.pad_token_id)
    wins = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    responses = bench.unseen.responses
    changes = score_substitutions(model, bench.unseen, SUBSTITUTIONS, 1, "exact changes, unseen")
    prefix, u_BNTD = model.prefix(responses.prompts), model.embed(responses.tokens_BNT).detach()
    with torch.no_grad():
        forward_sec = _seconds(lambda: model.score(prefix, u_BNTD, responses.mask_BNT))

    def figures(value_gradient: ValueGradient, **more: Any) -> dict[str, Any]:
        found = compare_changes(model, responses.tokens_BNT, changes, value_gradient(u_BNTD)[1]).to_dict()
        found["share_of_best"] = found["top8_gain"] / found["best8_gain"]
        return found | {"cost_in_forwards": _seconds(lambda: value_gradient(u_BNTD)) / forward_sec} | more

    plain = score_gradient(model, prefix, responses.mask_BNT)
    directions = {"gradient": figures(plain)}
    for scale in NOISE_SCALES:
        directions[f"{NOISY_GRADIENTS} gradients, noise {scale}"] = figures(
            noisy_gradient(plain, scale * model.table_scale, NOISY_GRADIENTS)
        )
    if variant.input_skip:
        skip_BNTD = model.skip_gradient(responses.mask_BNT)
        directions["one direction, the skip's"] = figures(lambda _: (None, skip_BNTD))
    if variant.secant:
        start = time.process_time()
        training = SecantTraining()
        fitted_changes = score_substitutions(model, bench.fitted_on, training.substitutions, 0, "exact changes, fit")
        scored_sec = time.process_time() - start
        whole = secant_targets(model, bench.fitted_on.responses, fitted_changes, "none")
        constants = {
            "one direction, ridge": constant_direction(whole),
            "one direction, mean gradient": mean_gradient(model, bench.fitted_on),
        }
        scale_BN11 = direction_scale(model, responses.mask_BNT)
        for name, one_D in constants.items():
            field_BNTD = one_D * scale_BN11 * torch.ones_like(u_BNTD)
            directions[name] = figures(lambda _, field_BNTD=field_BNTD: (None, field_BNTD))
    for base in variant.secant:
        start = time.process_time()
        targets = secant_targets(model, bench.fitted_on.responses, fitted_changes, base)
        head, _ = fit_secant_head(targets, training, base)
        seconds = {"score_sec": round(scored_sec, 1), "fit_sec": round(time.process_time() - start, 1)}
        directions[f"secant on {base}"] = figures(secant_gradient(head)(model, prefix, responses), **seconds)
    return {
        "accuracy": wins / len(chosen),
        "accuracy_interval": wilson_interval(wins, len(chosen)),
        "score_std": statistics.pstdev([*chosen, *rejected]),
        "directions": directions,
    }


def _seconds(work: Callable[[], Any], repetitions: int = 3) -> float:
    """Median processor time."""
    taken = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def rounded(item: Any) -> Any:
    """Round every number of a result to four significant digits."""
    if isinstance(item, dict):
        return {key: rounded(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [rounded(value) for value in item]
    return float(f"{item:.4g}") if isinstance(item, float) else item


def table(results: dict[str, Any]) -> str:
    """Render the results as Markdown."""
    lines = [
        "| variant | steps | train s | accuracy | direction | Spearman (95%) | gain of 8: by it / best / random "
        "| share | forwards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        train = "-" if found["train_sec"] is None else f"{found['train_sec']:.0f}"
        for direction, f in found["directions"].items():
            lines.append(
                f"| {name} | {found['steps']} | {train} | {found['accuracy']:.2f} | {direction} | "
                f"{f['spearman']:.2f} ({f['low']:.2f} to {f['high']:.2f}) | {f['top8_gain']:.2f} / "
                f"{f['best8_gain']:.2f} / {f['random8_gain']:.2f} | {f['share_of_best']:.0%} | "
                f"{f['cost_in_forwards']:.1f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run what has no result yet, print the table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description="Gradient fidelity of training variants and directions.")
    parser.add_argument("--only", action="append", help="names of variants; all when not given")
    parser.add_argument("--work", type=Path, default=Path("outputs/fidelity"), help="folder of results so far")
    parser.add_argument("--learning-rate", type=float, default=2.0e-5, help="of the two-layer body")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--finished", action="store_true", help="report what has a result, and run nothing")
    parser.add_argument("--record", action="store_true", help="write docs/results/fidelity.json too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    work, bench = check_writable(arguments.work), None
    chosen = [v for v in variants(arguments.learning_rate) if arguments.only is None or v.name in arguments.only]
    results = {}
    for variant in chosen:
        path = work / f"{slug(variant)}.json"
        if arguments.finished and not path.exists():
            continue
        if not path.exists():
            bench = bench or load_bench(work)
            print(f"{variant.name}: {variant.num_steps} steps", flush=True)
            kept = work / "models" / slug(variant)
            if (kept / "config.json").exists():
                model, train_sec = load_reward_model(kept), None
            else:
                model, train_sec = train_variant(bench, variant, work / "trainer")
            found = {"steps": variant.num_steps, "train_sec": train_sec, **measure_variant(bench, variant, model)}
            write_json_atomic(path, rounded({"settings": dataclasses.asdict(variant), **found}))
        results[variant.name] = json.loads(path.read_text())
    print(table(results))
    record = {
        "variants": results,
        "not run": [v.name for v in variants(arguments.learning_rate) if v.name not in results],
        "command": "python -m benchmarks.fidelity --record",
        "threads": arguments.threads,
        "responses": "base samples, 2 to each of the 30 validation prompts",
        "substitutions": SUBSTITUTIONS,
    }
    if arguments.record:
        write_json_atomic(check_writable("docs/results") / "fidelity.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
