"""Fit a secant head to a trained reward model, and say what it brings on prompts that it has not seen.

    vgf-llm secant --config recipes/<task>/secant.yaml
    python -m reward_models.train_secant --config recipes/<task>/secant.yaml

Samples responses of the base model, scores one-token substitutions in them exactly, and regresses the head on the
changes (`secant_fit`). Writes secant.safetensors and secant.json beside the reward model's weights, prints gradient
fidelity before and after, and ends with one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reward_models.inputs import check_reward_model
from reward_models.secant_settings import SecantScript, SecantTraining, SubstitutionSettings
from reward_models.sources import is_hub_name
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, working
from vgf_llm.console.screen import emit, show
from vgf_llm.errors import ConfigError, DataError, ModelError
from vgf_llm.machine.device import resolve_device
from vgf_llm.machine.precision import with_dtype
from vgf_llm.models.inputs import check_base_model
from vgf_llm.runs.files import check_writable
from vgf_llm.settings import SamplingSettings
from vgf_llm.settings.parse import parse

if TYPE_CHECKING:
    from reward_models.fidelity import Fidelity
    from reward_models.secant_fit import Sampled
    from vgf_llm.data.dialogue import PromptText


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0; errors that are the user's to mend are VGFErrors."""
    script, training, sampling = parse(
        SecantScript,
        SecantTraining,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm secant",
        description="Fit a secant head to a reward model: a direction that predicts what token changes do.",
    )
    with library_output(script.reward_model):
        emit(json.dumps(run(script, training, sampling)))
    return 0


def run(script: SecantScript, training: SecantTraining, sampling: SamplingSettings) -> dict[str, Any]:
    """Sample, score, fit, measure and save; returns the figures of secant.json.

    Raises:
        VGFError: reward model, prompts or output folder are unusable, or a prompt is in both files.
    """
    check_reward_model(script.reward_model)
    if is_hub_name(script.reward_model):
        raise ConfigError(
            f"reward_model {script.reward_model!r} is a name on the hub, and the head is written beside the model: run "
            "`vgf-llm import-reward` first and name its folder"
        )
    check_base_model(script.model_name_or_path)
    folder = check_writable(script.reward_model)
    fit_prompts, unseen_prompts = read_prompts(script)
    load_libraries("reward_models.loading", "reward_models.secant_fit")
    script = with_dtype(script)
    from reward_models.loading import load_reward_model
    from reward_models.secant import save_secant_head
    from reward_models.secant_fit import compare_with_gradient, fit_secant_head, score_substitutions, secant_targets
    from vgf_llm.models.base import tokenizer_of

    tokenizer = tokenizer_of(script)
    with working(f"loading the reward model {script.reward_model}"):
        value = load_reward_model(
            script.reward_model,
            tokenizer=tokenizer,
            device=resolve_device(script.device),
            outputs=script.reward_outputs or None,
        )
    if training.base == "skip" and value.skip_head is None:
        raise ModelError(f"base is 'skip', but '{script.reward_model}' has no input skip; set base to gradient or none")
    start = time.monotonic()
    fitted_on, unseen = _sample(
        script, sampling, tokenizer, [fit_prompts, unseen_prompts], len(value.embedding_table_VD)
    )
    sampled_sec, start = time.monotonic() - start, time.monotonic()
    changes = score_substitutions(value, fitted_on, training.substitutions, script.seed, "scoring substitutions")
    scored_sec, start = time.monotonic() - start, time.monotonic()
    targets = secant_targets(value, fitted_on.responses, changes, training.base)
    head, losses = fit_secant_head(targets, training, training.base)
    fit_sec = time.monotonic() - start
    held_out = score_substitutions(value, unseen, script.validation_substitutions, script.seed + 1, "measuring")
    before, after = compare_with_gradient(value, head, unseen.responses, held_out)
    last = losses[-max(1, len(losses) // 10) :]
    figures = {
        "spearman_before": before.spearman,
        "spearman_after": after.spearman,
        "top8_share_before": before.top8_share,
        "top8_share_after": after.top8_share,
        "responses": len({(c.b, c.n) for c in changes}),
        "pairs": len(targets.target_X),
        "seconds": {"sample": round(sampled_sec, 1), "score": round(scored_sec, 1), "fit": round(fit_sec, 1)},
        "loss": sum(last) / len(last),
    }
    details = {"fidelity": {"before": before.to_dict(), "after": after.to_dict()}}
    settings = {
        "reward_outputs": value.reward_outputs,
        "training": dataclasses.asdict(training),
        "sampling": dataclasses.asdict(sampling),
        "seed": script.seed,
        "dtype": script.dtype,
    }
    save_secant_head(head, folder, **figures, **details, **settings)
    _print_table(script, before, after)
    return figures


def read_prompts(script: SubstitutionSettings) -> tuple[list[PromptText], list[PromptText]]:
    """Read the prompts to fit on and those to measure on, with the other columns of their rows.

    Raises:
        DataError: A file cannot be read, or a prompt is in both.
    """
    from vgf_llm.data.dialogue import prompt_key
    from vgf_llm.data.prompts import load_prompt_texts

    column, system = script.prompt_column, script.system_column
    fitted = load_prompt_texts(script.prompts, column, limit=script.num_prompts, system_column=system)
    unseen = load_prompt_texts(
        script.validation_prompts, column, limit=script.num_validation_prompts, system_column=system
    )
    known = {prompt_key(text.prompt) for text in fitted}
    for row, text in enumerate(unseen):
        if prompt_key(text.prompt) in known:
            raise DataError(
                f"{script.validation_prompts}, prompt {row} is in {script.prompts} too, so fidelity would be measured "
                "on what was fitted; give other prompts"
            )
    return fitted, unseen


def _sample(
    script: SecantScript, sampling: SamplingSettings, tokenizer: Any, prompts: list[list[Any]], most_rows: int
) -> list[Sampled]:
    """Sample the base model on each list of prompts; ids stay below the rows of the value's table."""
    from reward_models.secant_fit import sample_reference
    from vgf_llm.data.encoding import encode_prompts
    from vgf_llm.models.base import load_base
    from vgf_llm.text.reference import TorchReference

    with working(f"loading the base model {script.model_name_or_path}"):
        base = load_base(script, tokenizer, resolve_device(script.device)).within(most_rows)
    reference = TorchReference(base.lm, sampling, base.eos_ids, base.pad_id, base.vocabulary)
    return [
        sample_reference(
            reference,
            encode_prompts(tokenizer, group, base.rows, base.max_positions, sampling.max_new_tokens),
            script.responses,
            script.shortlist,
            script.seed + index,
        )
        for index, group in enumerate(prompts)
    ]


def _print_table(script: SecantScript, before: Fidelity, after: Fidelity) -> None:
    from rich.table import Table

    table = Table(title=f"Gradient fidelity of {script.reward_model}, {before.n} responses to unseen prompts")
    for column in ("direction", "Spearman (95%)", "gain of its top 8", "of the best 8", "share"):
        table.add_column(column)
    for name, found in (("input gradient", before), ("secant head", after)):
        table.add_row(
            name,
            f"{found.spearman:.2f} ({found.low:.2f} to {found.high:.2f})",
            f"{found.top8_gain:.2f}",
            f"{found.best8_gain:.2f}",
            f"{found.top8_share:.0%}",
        )
    show(table)


if __name__ == "__main__":
    sys.exit(run_main(main))
