"""Our trainer on the comparison's task: the recipe, with what the comparison holds equal set over it.

    python -m benchmarks.training_vgf --method vgf --learning_rate 1e-4 --minutes 10 --dtype bfloat16
        --reward_model outputs/smollm2_sentiment/reward --output_dir outputs/training/vgf

It is ``python -m vgf_llm.train`` with a callback that stops it by the clock. Budget, loss and weights are the recipe's;
model, LoRA, prompts, reward, sampling distribution, dtype, batch and schedule are those of every method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_job import Job
from vgf_llm.cli import run_main
from vgf_llm.errors import ConfigError
from vgf_llm.machine.precision import with_dtype
from vgf_llm.runs.files import check_writable
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import parse

_LOGGING_STEPS = 10  # TRL's default; a log line samples the policy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    job, models, sampling = parse(
        Job, ModelSettings, SamplingSettings, argv=argv, prog="python -m benchmarks.training_vgf"
    )
    print(json.dumps(run(job, with_dtype(models), sampling)))
    return 0


def run(job: Job, models: ModelSettings, sampling: SamplingSettings) -> dict[str, Any]:
    """Train with our trainer and return what was written to result.json.

    Raises:
        ConfigError: The method is another one, or no reward model is named.
        VGFError: Model, reward model, recipe or prompts are unusable.
    """
    if job.method != "vgf":
        raise ConfigError(f"method {job.method!r} is not ours; use benchmarks.training_trl")
    if models.reward_model is None:
        raise ConfigError("reward_model is not set; train one with `vgf-llm reward` and name its folder")
    check_writable(job.output_dir)
    from benchmarks.training_marks import CLOCKS, TimeMarks, write_result
    from vgf_llm import train
    from vgf_llm.training.settings import OptimSettings, PolicySettings, TrainScript, VGFSettings

    settings = parse(
        TrainScript,
        PolicySettings,
        VGFSettings,
        OptimSettings,
        SamplingSettings,
        argv=arguments(job, models, sampling),
        prog="python -m vgf_llm.train",
    )
    marks = TimeMarks(job.output_dir, job.minutes, job.marks, clock=CLOCKS[job.clock])
    train.run(*settings, callbacks=[marks])
    return write_result(job, models, sampling, marks, {})


def arguments(job: Job, models: ModelSettings, sampling: SamplingSettings) -> list[str]:
    """Return the flags of ``python -m vgf_llm.train`` for a job."""
    flags = {
        "config": job.recipe,
        "prompts": job.prompts,
        "rewards": json.dumps([models.reward_model]),
        "output_dir": str(Path(job.output_dir) / "trainer"),
        "model_name_or_path": models.model_name_or_path,
        "dtype": models.dtype,
        "lora_r": job.lora_r,
        "lora_alpha": job.lora_alpha,
        "num_particles": job.num_generations,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_steps": job.max_steps,
        "per_device_train_batch_size": job.prompts_per_step,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "logging_steps": _LOGGING_STEPS,
        "save_steps": "null",
        "seed": job.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
    }
    return [token for key, value in flags.items() for token in (f"--{key}", str(value))]


if __name__ == "__main__":
    sys.exit(run_main(main))
