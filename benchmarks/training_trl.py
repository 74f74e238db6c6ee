"""One of TRL's trainers on the comparison's task: GRPO, RLOO, or DPO on pairs of the base's own samples.

    python -m benchmarks.training_trl --method grpo --learning_rate 5e-5 --minutes 10 --dtype bfloat16 --top_k 50
        --reward_model outputs/smollm2_sentiment/reward --output_dir outputs/training/grpo

Model, LoRA, prompts, reward, sampling distribution and dtype are those of every method. The rest is TRL 1.16's default,
or what its documentation recommends where that differs, and these are the reasons:

    learning_rate       ten times the default under LoRA (TRL, PEFT integration: GRPO 1e-5, DPO 5e-6); its other page
                        on LoRA (LoRA without regret) takes 5e-5 for GRPO. So it is tuned, see benchmarks/training.py
    lr_scheduler_type   constant for every method: the run ends by the clock, and every mark is a result of its own
    num_generations     8, GRPO's default; RLOO's default of 2 is that of the smallest group, and a larger group has
                        the less noisy baseline at the same number of responses a step
    batch               4 prompts x 8 responses = 32 (LoRA without regret: LoRA tolerates large batches less, stay at
                        about 32), forwards of 8, the default, accumulated: as fast here as one forward of 32, at 3.4
                        GiB in place of 5.8; for DPO 16 pairs, as many responses, 4 pairs a forward
    beta                defaults: GRPO 0 (no KL term), RLOO 0.05 (KL in the reward), DPO 0.1
    loss, scaling       defaults: GRPO's dapo with group-scaled rewards, RLOO without normalisation, DPO's sigmoid
    mask_truncated...   False, the default. Most responses here reach 24 tokens; masking them would leave nothing
    steps_per_generation, num_iterations  1: every step is on-policy
    gradient_checkpointing  False, against the default: it trades speed for memory, and time is what is equal here. Our
                        trainer has it off too
    bf16, use_cpu       autocast where the parameters are bfloat16, as TRL's default has it; CPU where there is no GPU

DPO samples for the first fifth of its time, pass after pass over the prompts, with this package's sampler (which is
faster than `generate`), and pairs the best with the worst of every 8 by the reward. It trains on the very tokens that
were sampled: TRL's own preparation would close texts that were cut at 24 tokens with an end of turn.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.training_job import Job
from vgf_llm.cli import run_main
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.machine.device import resolve_device
from vgf_llm.machine.precision import with_dtype
from vgf_llm.runs.files import check_writable
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import parse

if TYPE_CHECKING:
    from vgf_llm.answering.pipeline import Pipeline

SAMPLING_SHARE = 0.2  # of DPO's time; below a quarter, so that its first mark has trained
_PROMPTS_A_BATCH = 8
_RESPONSES_A_FORWARD = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    job, models, sampling = parse(
        Job, ModelSettings, SamplingSettings, argv=argv, prog="python -m benchmarks.training_trl"
    )
    print(json.dumps(run(job, with_dtype(models), sampling)))
    return 0


def run(job: Job, models: ModelSettings, sampling: SamplingSettings) -> dict[str, Any]:
    """Train with one of TRL's trainers and return what was written to result.json.

    Raises:
        ConfigError: The method is not TRL's.
        VGFError: Model, reward model or prompts are unusable.
    """
    trainers = {"grpo": _grpo, "rloo": _rloo, "dpo": _dpo}
    if job.method not in trainers:
        raise ConfigError(f"method {job.method!r} is not TRL's; use {', '.join(trainers)}")
    check_writable(job.output_dir)
    from transformers import set_seed

    from benchmarks.training_marks import CLOCKS, TimeMarks, write_result
    from vgf_llm.answering.pipeline import load_pipeline
    from vgf_llm.data.dialogue import as_messages, as_text
    from vgf_llm.data.prompts import load_prompts

    set_seed(job.seed)
    pipeline = load_pipeline(models, sampling)
    shape = as_messages if pipeline.tokenizer.chat_template else as_text
    prompts = [shape(prompt) for prompt in load_prompts(job.prompts)]
    marks = TimeMarks(job.output_dir, job.minutes, job.marks, clock=CLOCKS[job.clock])
    facts = trainers[job.method](job, models, sampling, pipeline, prompts, marks)
    return write_result(job, models, sampling, marks, facts)


def _grpo(
    job: Job, models: ModelSettings, sampling: SamplingSettings, pipeline: Pipeline, prompts: list[Any], marks: Any
) -> dict[str, Any]:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(**_common(job, models), **_online(job, sampling))
    return _train_online(GRPOTrainer, args, job, pipeline, prompts, marks)


def _rloo(
    job: Job, models: ModelSettings, sampling: SamplingSettings, pipeline: Pipeline, prompts: list[Any], marks: Any
) -> dict[str, Any]:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(**_common(job, models), **_online(job, sampling))
    return _train_online(RLOOTrainer, args, job, pipeline, prompts, marks)


def _train_online(
    trainer_class: Any, args: Any, job: Job, pipeline: Pipeline, prompts: list[Any], marks: Any
) -> dict[str, Any]:
    """Train on samples of the policy, and hand the figures of the last log line on."""
    from datasets import Dataset

    trainer = trainer_class(
        model=pipeline.reference.model,
        reward_funcs=reward_function(pipeline),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=pipeline.tokenizer,
        peft_config=_lora(job),
        callbacks=[marks],
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return {"logged_reward": [round(reward, 4) for reward in rewards]}


def _dpo(
    job: Job, models: ModelSettings, sampling: SamplingSettings, pipeline: Pipeline, prompts: list[Any], marks: Any
) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class SampledPairs(DPOTrainer):
        """Takes pairs that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    started = marks.clock()
    pairs, sampled = sample_pairs(job, pipeline, prompts, job.minutes * 60 * SAMPLING_SHARE, marks.clock)
    marks.spent_sec = marks.clock() - started
    if not pairs:
        raise DataError(f"{job.prompts}: the reward is the same for all responses to every prompt; nothing to prefer")
    pairs_a_step = job.prompts_per_step * job.num_generations // 2
    trainer = SampledPairs(
        model=pipeline.reference.model,
        args=DPOConfig(**_common(job, models), **_batch(pairs_a_step, _RESPONSES_A_FORWARD // 2), beta=0.1),
        train_dataset=Dataset.from_list(pairs),
        processing_class=pipeline.tokenizer,
        peft_config=_lora(job),
        callbacks=[marks],
    )
    trainer.train()
    return {"pairs": len(pairs), "responses_sampled": sampled, "epochs": round(trainer.state.epoch or 0.0, 2)}


def sample_pairs(
    job: Job, pipeline: Pipeline, prompts: list[Any], limit_sec: float, clock: Callable[[], float]
) -> tuple[list[dict[str, list[int]]], int]:
    """Sample groups of responses until the time is up and pair the best of each group with the worst.

    Args:
        job: Group size and seed.
        pipeline: Reference and value.
        prompts: Text or messages.
        limit_sec: Seconds after which no further batch is begun; one is always sampled.
        clock: Seconds that only grow.

    Returns:
        Pairs as DPOTrainer's collator takes them, without groups of equal rewards, and how many responses were sampled.
    """
    from vgf_llm.answering.pipeline import encode_prompts
    from vgf_llm.text import row_seeds
    from vgf_llm.text.sampler import ReferenceSampler

    encoded = encode_prompts(pipeline, prompts)
    sampler, pairs, sampled, started = ReferenceSampler(pipeline.reference), [], 0, clock()
    while True:
        for start in range(0, len(encoded), _PROMPTS_A_BATCH):
            if sampled and clock() - started >= limit_sec:
                return pairs, sampled
            indices = list(range(start, min(start + _PROMPTS_A_BATCH, len(encoded))))
            # A later pass continues the numbering of prompts, so its noise is new.
            places = [i + sampled // (job.num_generations * len(encoded)) * len(encoded) for i in indices]
            ids = [encoded[i] for i in indices]
            responses = sampler.sample(ids, row_seeds(job.seed, places, job.num_generations))
            rows = [row[keep].tolist() for row, keep in _rows(responses)]
            rewards = token_rewards(pipeline, [p for p in ids for _ in range(job.num_generations)], rows)
            sampled += len(rows)
            for b, prompt in enumerate(ids):
                group = range(b * job.num_generations, (b + 1) * job.num_generations)
                best, worst = max(group, key=rewards.__getitem__), min(group, key=rewards.__getitem__)
                if rewards[best] > rewards[worst]:
                    pairs.append({"prompt_ids": prompt, "chosen_ids": rows[best], "rejected_ids": rows[worst]})


def _rows(responses: Any) -> Any:
    return zip(responses.tokens_BNT.flatten(0, 1), responses.mask_BNT.flatten(0, 1), strict=True)


def reward_function(pipeline: Pipeline) -> Callable[..., list[float]]:
    """Return the reward model as a reward function of TRL: it scores the very tokens that were sampled."""
    from vgf_llm.data.prompts import encode_prompt

    def reward_model(prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return token_rewards(pipeline, [encode_prompt(pipeline.tokenizer, p) for p in prompts], completion_ids)

    return reward_model


def token_rewards(pipeline: Pipeline, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    """Score R responses, each beside its prompt (token ids); a prompt that is repeated is run once."""
    import torch

    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: index for index, prompt in enumerate(unique)}
    device, length = pipeline.reference.device, max(len(row) for row in responses)
    pad = pipeline.reference.pad_id
    tokens_RT = torch.tensor([row + [pad] * (length - len(row)) for row in responses], device=device)
    lengths_R1 = torch.tensor([[len(row)] for row in responses], device=device)
    mask_RT = torch.arange(length, device=device) < lengths_R1
    rows_R = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    with torch.no_grad():
        prefix = pipeline.value.prefix([list(prompt) for prompt in unique]).select(rows_R)
        return pipeline.value.score(prefix, tokens_RT.unsqueeze(1), mask_RT.unsqueeze(1)).squeeze(1).tolist()


def _common(job: Job, models: ModelSettings) -> dict[str, Any]:
    """Return what every trainer is given."""
    return {
        "output_dir": str(Path(job.output_dir) / "trainer"),
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": job.max_steps,
        "seed": job.seed,
        "bf16": models.dtype == "bfloat16",
        "use_cpu": resolve_device(models.device) == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _online(job: Job, sampling: SamplingSettings) -> dict[str, Any]:
    """Return what GRPO and RLOO share: the sampling distribution and the batch."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "max_completion_length": sampling.max_new_tokens,
        "num_generations": job.num_generations,
        **_batch(job.prompts_per_step * job.num_generations, _RESPONSES_A_FORWARD),
    }


def _batch(rows: int, at_once: int) -> dict[str, int]:
    """Split the rows of a step into equal forwards of at most ``at_once``."""
    forward = math.gcd(rows, at_once)
    return {"per_device_train_batch_size": forward, "gradient_accumulation_steps": rows // forward}


def _lora(job: Job) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=job.lora_r, lora_alpha=job.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    sys.exit(run_main(main))
