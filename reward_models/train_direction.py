"""Fit a direction that needs no original, and state its fidelity to the true reward on unseen prompts.

    vgf-llm direction --kind causal --reward vader_compound --output_dir outputs/direction ...
    python -m reward_models.train_direction --config recipes/<task>/direction.yaml

Samples responses of the base model, scores one-token substitutions in them exactly, and fits a table, a constant or a
causal head to the changes (`reward_models/directions`). Writes direction.safetensors and direction.json, prints
fidelity, and ends with one line of JSON. Kind "secant" hands over to `vgf-llm secant`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reward_models.directions.settings import FOLDER_NAME, DirectionScript, DirectionTraining, check_direction
from reward_models.inputs import check_reward_model, check_rewards
from reward_models.secant_settings import SecantScript, SecantTraining
from reward_models.train_secant import read_prompts
from reward_models.train_secant import run as fit_secant
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries
from vgf_llm.console.screen import emit, say, show
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.machine.facts import hardware
from vgf_llm.machine.precision import with_dtype
from vgf_llm.models.inputs import check_base_model
from vgf_llm.runs.files import check_writable
from vgf_llm.settings import SamplingSettings
from vgf_llm.settings.parse import parse

if TYPE_CHECKING:
    from reward_models.directions.agreement import Agreement
    from reward_models.directions.fitting import Fitted
    from reward_models.directions.ground import Ground
    from vgf_llm.data.dialogue import PromptText

Shared = TypeVar("Shared", SecantScript, SecantTraining)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0; errors that are the user's to mend are VGFErrors."""
    script, training, sampling = parse(
        DirectionScript,
        DirectionTraining,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm direction",
        description="Fit a direction to a reward: a bonus for every token, known from the text before it.",
    )
    check_direction(script, training)
    folder = output_folder(script)
    with library_output(folder):
        emit(json.dumps(run(script, training, sampling)))
    return 0


def output_folder(script: DirectionScript) -> Path:
    """Return where the direction goes, once the rewards have been looked at.

    Raises:
        ConfigError: A function or folder does not exist, or a function's direction has no output_dir.
        ModelError: A folder holds no model.
    """
    if script.kind == "secant":
        check_reward_model(script.reward)
        return Path(script.reward)
    check_rewards([script.reward], script.gold)
    if script.output_dir is not None:
        return Path(script.output_dir)
    if Path(script.reward).is_dir():
        return Path(script.reward) / FOLDER_NAME / script.kind
    raise ConfigError(f"reward is the function {script.reward!r}, which has no folder; set output_dir")


def run(script: DirectionScript, training: DirectionTraining, sampling: SamplingSettings) -> dict[str, Any]:
    """Sample, score, fit, measure and save; returns the figures of direction.json.

    Raises:
        VGFError: Reward, prompts or output folder are unusable, or a prompt is in both files.
    """
    if script.kind == "secant":
        found = _shared(SecantScript, script, reward_model=script.reward), _shared(SecantTraining, training)
        return fit_secant(*found, sampling)
    check_base_model(script.model_name_or_path)
    folder = check_writable(output_folder(script))
    prompts, unseen, guided = _prompts(script)
    load_libraries("reward_models.loading", "reward_models.directions.measuring")
    script = with_dtype(script)
    from reward_models.directions.fitting import fit_direction
    from reward_models.directions.ground import load_ground
    from reward_models.directions.measuring import measure_fitted, sample_unseen

    ground = load_ground(script, sampling)
    for texts in (prompts, guided):
        ground.encode(texts)  # what is too long is refused before anything is sampled
    start = time.monotonic()
    measured_on = sample_unseen(ground, script, unseen)  # first, so that what cannot be measured is not fitted
    unseen_sec = time.monotonic() - start
    fitted = fit_direction(ground, script, training, prompts, guided)
    start = time.monotonic() - unseen_sec
    agreements, calls = measure_fitted(ground, script, fitted, measured_on)
    figures = {
        "fidelity": {
            name: {kind: agreement.to_dict() for kind, agreement in found.items()} for name, found in agreements.items()
        },
        "calls": {"fit": fitted.calls, "measure": calls},
        "seconds": fitted.seconds | {"measure": round(time.monotonic() - start, 1)},
        "fit": {name: found for name, found in fitted.figures.items() if name != "steering"},
        "steering": fitted.figures["steering"],
    }
    _save(ground, script, fitted, folder, figures | _settings(script, training, sampling, len(prompts), len(guided)))
    _print_table(script, agreements)
    return {"kind": script.kind, "reward": script.reward} | figures


def _save(ground: Ground, script: DirectionScript, fitted: Fitted, folder: Path, facts: dict[str, Any]) -> None:
    from reward_models.directions.reward import ModelReward
    from reward_models.directions.saving import FittedTo, save_direction

    reward, lm = ground.reward, ground.reference.model
    outputs = reward.value.reward_outputs if isinstance(reward, ModelReward) else script.reward_outputs
    fitted_to = FittedTo.of(script.reward, script.model_name_or_path, lm, ground.tokenizer, outputs)
    save_direction(fitted.direction, fitted.kind, folder, fitted_to, **facts)


def _settings(
    script: DirectionScript, training: DirectionTraining, sampling: SamplingSettings, prompts: int, guided: int
) -> dict[str, Any]:
    """Return what a fit can be repeated from."""
    names = ("gold", "guided", "responses", "validation_substitutions", "shortlist", "seed", "dtype", "device")
    return {
        "settings": {name: getattr(script, name) for name in names} | {"prompts": prompts, "guided_rows": guided},
        "training": dataclasses.asdict(training),
        "sampling": dataclasses.asdict(sampling),
        "machine": hardware(),
    }


def _prompts(script: DirectionScript) -> tuple[list[PromptText], list[PromptText], list[PromptText]]:
    """Read prompts and guided responses; check that functions find their columns, and that no unseen prompt was seen.

    Raises:
        VGFError: A file cannot be read, a column is missing, or a prompt is on both sides.
    """
    from vgf_llm.data.dialogue import prompt_key
    from vgf_llm.data.prompts import load_prompt_texts

    prompts, unseen = read_prompts(script)
    guided: list[PromptText] = []
    if script.guided is not None:
        guided = load_prompt_texts(script.guided, script.prompt_column, system_column=script.system_column)
        known = {prompt_key(text.prompt) for text in unseen}
        for number, text in enumerate(guided):
            if not isinstance(text.columns.get("response"), str):
                raise DataError(
                    f"{script.guided}, row {number}: no text in column 'response', got "
                    f"{text.columns.get('response')!r}; columns: {', '.join(text.columns) or 'none'}"
                )
            if prompt_key(text.prompt) in known:
                raise DataError(
                    f"{script.guided}, row {number}: the prompt is in {script.validation_prompts} too, so fidelity "
                    "would be measured on what was fitted; drop the row"
                )
        known = {prompt_key(text.prompt) for text in prompts}
        if shared := sum(prompt_key(text.prompt) in known for text in guided):
            say(
                f"{script.guided}: {shared} of {len(guided)} responses are to prompts of {script.prompts}; where such "
                "a prompt is held back, so are they"
            )
    for texts in (prompts, unseen, guided):
        if texts:
            check_rewards([script.reward], script.gold, texts)
    return prompts, unseen, guided


def _shared(kind: type[Shared], settings: Any, **more: Any) -> Shared:
    """Build a secant command's settings from the fields that it shares."""
    names = {field.name for field in dataclasses.fields(kind)} - set(more)
    return kind(**{name: getattr(settings, name) for name in names}, **more)


def _print_table(script: DirectionScript, agreements: dict[str, dict[str, Agreement]]) -> None:
    from rich.table import Table

    first = next(iter(agreements["reward"].values()))
    title = f"Fidelity on {first.responses} responses to {first.prompts} unseen prompts, {first.positions} positions"
    table = Table(title=title)
    for column in ("true reward", "direction", "weighted correlation", "Spearman", "share of the best 8"):
        table.add_column(column)
    names = {"reward": script.reward, "gold": script.gold or ""}
    for name, found in agreements.items():
        for kind, measured in found.items():
            estimates = (measured.weighted_correlation, measured.spearman, measured.top8_share)
            cells = [f"{one.mean:.2f} ({one.low:.2f} to {one.high:.2f})" for one in estimates]
            table.add_row(Path(names[name]).name, kind, *cells)
    show(table)


if __name__ == "__main__":
    sys.exit(run_main(main))
