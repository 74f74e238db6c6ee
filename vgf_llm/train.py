r"""Fine-tune a language model by Value Gradient Flow.

    python -m vgf_llm.train --config recipes/<task>/vgf.yaml
    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml \
        -m vgf_llm.train --config recipes/<task>/vgf.yaml

Writes the adapter (or model), the learned value, metrics.jsonl, completions and checkpoints into output_dir, and ends
with one line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.inputs import check_rewards
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, stage, working
from vgf_llm.console.screen import emit, show
from vgf_llm.engines.inputs import check_engine
from vgf_llm.errors import ConfigError
from vgf_llm.machine.precision import for_training
from vgf_llm.models.inputs import check_base_model
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.runs.result import settle
from vgf_llm.runs.resume import check_resume, refuse_new_run
from vgf_llm.settings import SamplingSettings, check_decoder_options
from vgf_llm.settings.parse import dump, parse
from vgf_llm.settings.trainer_names import check_trainer_settings
from vgf_llm.training.settings import OptimSettings, PolicySettings, TrainScript, VGFSettings, check_direction

if TYPE_CHECKING:
    from vgf_llm.data.dialogue import PromptText
    from vgf_llm.training.trainer import VGFTrainer

CONFIG_NAME = "vgf_config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0; errors that are the user's to mend are VGFErrors."""
    settings = parse(
        TrainScript,
        PolicySettings,
        VGFSettings,
        OptimSettings,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm train",
        description="Fine-tune a language model by Value Gradient Flow.",
    )
    check_resume(settings[3].resume, settings[0].output_dir)
    with library_output(settings[0].output_dir):
        run(*settings)
    return 0


def run(
    script: TrainScript,
    policy: PolicySettings,
    method: VGFSettings,
    optim: OptimSettings,
    sampling: SamplingSettings,
    callbacks: Sequence[Any] = (),
) -> dict[str, float]:
    """Train, save and report; returns the last logged metrics.

    Args:
        script: Prompts, rewards, output.
        policy: The model.
        method: Budget, decoder, loss.
        optim: Optimisation and checkpoints.
        sampling: The distribution of responses.
        callbacks: Further transformers TrainerCallbacks.

    Raises:
        VGFError: Something given is unusable; found before any training.
    """
    check_resume(optim.resume, script.output_dir)
    settle(check_writable(script.output_dir))
    prompts = look_at_inputs(script, policy, method, optim)
    load_libraries("vgf_llm.training.build")
    policy, optim = for_training(policy, optim)
    from vgf_llm.console.trainer_screen import shown
    from vgf_llm.runs.going_on import is_finished
    from vgf_llm.runs.trainer_internals import steps_wanted
    from vgf_llm.training.finished import take_result
    from vgf_llm.training.observing import bar_figures, says_lines
    from vgf_llm.training.resume import checkpoint_to_resume

    trainer = build_trainer(script, policy, method, optim, sampling, callbacks, prompts)
    checkpoint = checkpoint_to_resume(trainer.checkpoints, optim, lambda: steps_wanted(trainer))
    if trainer.is_world_process_zero():
        write_json_atomic(f"{script.output_dir}/{CONFIG_NAME}", dump(script, policy, method, optim, sampling))
    if checkpoint is not None and is_finished(Path(checkpoint), steps_wanted(trainer)):
        state = take_result(trainer.checkpoints, checkpoint)
    else:
        stage(f"training {trainer.method.loss} on {len(trainer.prompts)} prompts")
        with shown(trainer, "training", bar_figures, says_lines(trainer.args)):
            trainer.train(resume_from_checkpoint=checkpoint)
        with working("saving the model"):
            trainer.save_model()
        state = trainer.state
    lines = [row for row in state.log_history if "loss" in row]
    last = {"steps": state.global_step} | (lines[-1] if lines else {})
    if trainer.is_world_process_zero():
        print_table(last, script.output_dir)
        emit(json.dumps(last))
    return last


def build_trainer(
    script: TrainScript,
    policy: PolicySettings,
    method: VGFSettings,
    optim: OptimSettings,
    sampling: SamplingSettings,
    callbacks: Sequence[Any] = (),
    prompts: Sequence[PromptText] | None = None,
) -> VGFTrainer:
    """Put the trainer together as `vgf_llm.training.build.build` does, which has the arguments.

    ``prompts`` is what `look_at_inputs` returned; it is called when they are not given.

    Raises:
        VGFError: Prompts, models or settings are unusable.
    """
    texts = look_at_inputs(script, policy, method, optim) if prompts is None else prompts
    from vgf_llm.training.build import build

    return build(script, policy, method, optim, sampling, texts, callbacks)


def look_at_inputs(
    script: TrainScript, policy: PolicySettings, method: VGFSettings, optim: OptimSettings
) -> Sequence[PromptText]:
    """Look at everything that can be judged without a model, and return the prompts.

    Raises:
        VGFError: Something is unusable.
    """
    from vgf_llm.data.prompts import load_prompt_texts

    check_base_model(policy.model_name_or_path)
    refuse_adapter_on_adapter(policy)
    check_trainer_settings(optim, ("ddp_find_unused_parameters",))
    check_resume(optim.resume, script.output_dir)
    refuse_new_run(optim.resume, script.output_dir)
    check_direction(method)
    check_decoder_options(method.decoder, method.decoder_options)
    check_engine(method.backend, method.engine.url)
    check_rewards(script.rewards, script.gold, calls=script)
    texts = load_prompt_texts(
        script.prompts, script.prompt_column, limit=script.num_prompts, system_column=script.system_column
    )
    check_rewards(script.rewards, script.gold, texts)
    return texts


def refuse_adapter_on_adapter(policy: PolicySettings) -> None:
    """A new adapter is saved without the one below it, and would be loaded on the wrong base.

    Raises:
        ConfigError: The model is an adapter, and another one is to be trained on it.
    """
    folder = Path(policy.model_name_or_path)
    if policy.lora_r and (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model_name_or_path: '{folder}' is an adapter, and the new one would be saved without it; merge it into a "
            "model first (docs/training.md shows how), or train in full with lora_r: 0"
        )


def print_table(metrics: dict[str, Any], output_dir: str) -> None:
    """Print the last logged metrics as a table."""
    from rich.table import Table

    table = Table(title=f"Last log line; result in {output_dir}", show_header=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    show(table)


if __name__ == "__main__":
    sys.exit(run_main(main))
