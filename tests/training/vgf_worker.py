"""What a process of a distributed test runs: fine-tunings of the tiny model, one after another in the same processes.

    accelerate launch ... tests/training/vgf_worker.py <folder> <job> [<job> ...]

Every job's report goes to <folder>/<job>.json and its trained tensors to <folder>/<job>.safetensors, by rank 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.training.tiny import settings, write_inputs
from vgf_llm.distributed.processes import leave_process_group
from vgf_llm.runs.files import write_json_atomic
from vgf_llm.settings.parse import dump
from vgf_llm.train import CONFIG_NAME, build_trainer
from vgf_llm.training.batch import TrainBatch
from vgf_llm.training.checkpoints import trained_tensors
from vgf_llm.training.resume import checkpoint_to_resume

PROMPTS = (
    "dog",
    "write one sentence about the old red house and the sea",
    "the cat",
    "write about rain",
    "coffee with tea",
    "it is a happy day and it smells of rain with the old train",
    "night",
    "like this bicycle",
    "a new blue chair is not a table",
)
COMMON: dict[str, Any] = {"max_grad_norm": 0, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 3}
SGD: dict[str, Any] = {"trainer_arguments": {"disable_tqdm": True, "optim": "sgd"}, "learning_rate": 0.1}
SGD |= {"learned": {"learning_rate": 0.01, "head_learning_rate": 0.1}}
ADAM = {"learning_rate": 1e-3, "learned": {"learning_rate": 1e-4, "head_learning_rate": 1e-3}}
SECANT = {"gradient": "secant", "secant_learning_rate": 0.1}
FITTED: dict[str, Any] = {"value": "reward", "direction": "causal", "learned": {}}
RESUMED: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learned": {"learning_rate": 1e-3, "target_tau": 0.5}}
JOBS: dict[str, dict[str, Any]] = {
    "lora_sgd": SGD | {"kl_coefficient": 0.1},
    "lora_adam": ADAM,
    "full_sgd": SGD | {"lora_r": 0, "learning_rate": 0.01},
    "standardised": ADAM,
    "dpo_sgd": SGD | {"loss": "dpo", "learned": SGD["learned"] | SECANT},
    "direction": SGD | FITTED,
    "whole": RESUMED | {"learned": RESUMED["learned"] | SECANT},
    "resumed": RESUMED | {"learned": RESUMED["learned"] | SECANT},
    "whole_full": RESUMED | {"lora_r": 0, "logging_steps": 3},  # its line is half done when the checkpoint is written
    "resumed_full": RESUMED | {"lora_r": 0, "logging_steps": 3},
}

COMPOSED = ("standardised", "whole", "resumed")  # their reward is standardised by running statistics
REWARD = """
sum:
  - {reward: "tests.training.tiny:good_words", standardise: true, clip: [-3, 3]}
  - {reward: length_words, weight: 0.05}
require: [{reward: words_within, arguments: {at_least: 3}}]
otherwise: -1.0
"""


def parts_of(folder: Path, job: str, batch: int, accumulation: int = 1, **more: Any) -> tuple[Any, ...]:
    """Return the dataclasses of one job."""
    changes = COMMON | JOBS[job] | {"learned": dict(JOBS[job]["learned"])}
    if job in COMPOSED:
        changes["rewards"] = [str(folder / "composed.yaml")]
    first = folder / job.replace("resumed", "whole") / "checkpoint-2"
    return settings(
        folder,
        prompts=str(folder / "rows.txt"),
        output_dir=str(folder / job),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        resume=str(first) if job.startswith("resumed") else False,
        **changes,
        **more,
    )


def train(folder: Path, job: str, batch: int, accumulation: int = 1) -> dict[str, Any]:
    """Run one job as the command does and return its report, the same on every process."""
    parts = parts_of(folder, job, batch, accumulation)
    trainer = build_trainer(*parts)
    if trainer.is_world_process_zero():
        write_json_atomic(folder / job / CONFIG_NAME, dump(*parts))
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:  # else everything is small enough to stay whole
        plugin.deepspeed_config["zero_optimization"].update(stage3_param_persistence_threshold=0)
    seen = watch(trainer)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.checkpoints, parts[3]))
    engine = trainer.model_wrapped
    tensors = trained_tensors(trainer.model) | untrained(trainer)
    report = {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if trainer.is_deepspeed_enabled else None,
        "clipping": engine.gradient_clipping() if trainer.is_deepspeed_enabled else None,
        "processes": trainer.accelerator.num_processes,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "prompts": everywhere(seen),
        "norms": {name: float(tensor.double().norm()) for name, tensor in tensors.items()},
    }
    if trainer.is_world_process_zero():
        save_file(tensors, folder / f"{job}.safetensors")
        (folder / f"{job}.json").write_text(json.dumps(report))
    spread = everywhere([report["norms"]])
    assert all(norms == spread[0] for norms in spread), "the processes hold different weights"
    return report


def untrained(trainer: Any) -> dict[str, torch.Tensor]:
    """What a run has besides what its optimiser trains: the value's target, or a fitted direction."""
    if trainer.learned is None:
        return {f"direction.{name}": w.clone() for name, w in trainer.transport.tensors.items()}
    return {f"target.{name}": w.clone() for name, w in trainer.learned.target.weights.items()}


def watch(trainer: Any) -> list[tuple[int, int, list[int]]]:
    """Note step, rank and prompts of everything that is learned from, from now on."""
    seen: list[tuple[int, int, list[int]]] = []
    compute_loss = trainer.compute_loss
    make_batch = trainer.learner.batch
    prompts: dict[int, list[int]] = {}  # by the id of a batch's tokens, which are kept when its effect is taken away

    def with_prompts(rollout: Any, step: int) -> TrainBatch:
        batch: TrainBatch = make_batch(rollout, step)
        prompts[id(batch.rows.input_ids_RS)] = [prompt.index for prompt in rollout.prompts]
        return batch

    def noted(model: Any, inputs: TrainBatch, **kwargs: Any) -> Any:
        counted = inputs.rows.mask_RT.any()
        step, rank = trainer.state.global_step, trainer.accelerator.process_index
        seen.append((step, rank, prompts.pop(id(inputs.rows.input_ids_RS)) if counted else []))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss, trainer.learner.batch = noted, with_prompts
    return seen


def prepare(folder: Path) -> None:
    """Write the model and the prompts of all jobs."""
    write_inputs(folder)
    (folder / "composed.yaml").write_text(REWARD)
    (folder / "rows.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))


def everywhere(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes."""
    if not torch.distributed.is_initialized():
        return items
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        train(folder, job, batch=2)
    leave_process_group()


if __name__ == "__main__":
    main()
