"""What a process of an engine test runs: a tiny model trained plainly, with gathered weights in between, and resumed.

    accelerate launch ... tests/training/engine_worker.py <full|lora|wrapped> <folder>

Prints one line of JSON from rank 0 and writes the trained weights to <folder>/weights.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.conftest import build_llama
from vgf_llm.distributed.fsdp import require_sharding, shard_on_cpu
from vgf_llm.distributed.gather import full_tensors, whole_weights
from vgf_llm.distributed.processes import leave_process_group

STEPS = 3
# under DDP the Trainer loads the optimiser onto its device, which is cpu:0 here, a name torch.load does not know
torch.serialization.register_package(15, lambda _: None, lambda held, place: held if place == "cpu:0" else None)


class Wrapped(nn.Module):
    """Two models under one engine, called through one forward, as policy and value are."""

    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = build_llama(tied=True), build_llama(tied=False, layers=1, seed=1)
        self.config = self.policy.config

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = [model(input_ids=input_ids, labels=labels) for model in (self.policy, self.value)]
        return {"loss": outputs[0].loss + outputs[1].loss, "logits": outputs[0].logits}


def build(kind: str) -> nn.Module:
    if kind == "wrapped":
        return Wrapped()
    model: Any = build_llama(tied=kind == "full")
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


class EngineTrainer(Trainer):
    """A Trainer that may run forwards of its own before every step: three on rank 0, five on rank 1."""

    samples = False
    inside: list[float]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.samples:
            self.inside = self.sample(3 + 2 * self.accelerator.process_index)
        return super().get_batch_samples(*args, **kwargs)

    def sample(self, forwards: int) -> list[float]:
        sums = []
        lm = getattr(self.model, "policy", self.model)
        tokens = torch.arange(8).unsqueeze(0) + self.accelerator.process_index
        with whole_weights(self.accelerator, self.model_wrapped):
            was = self.model.training
            self.model.eval()
            for _ in range(forwards):
                with torch.no_grad():
                    sums.append(lm(input_ids=tokens).logits.double().sum().item())
            lm.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=forwards)
            particles = lm.get_input_embeddings()(tokens).detach().requires_grad_()
            for _ in range(forwards):
                (gradient,) = torch.autograd.grad(lm(inputs_embeds=particles).logits.sum(), particles)
                assert gradient.abs().sum() > 0
            with whole_weights(self.accelerator, self.model_wrapped) as again:  # nested: nothing
                assert again is self.model
                full_tensors(self.model, [next(name for name, _ in self.model.named_parameters())])
            self.model.train(was)
        assert all(parameter.grad is None for parameter in lm.parameters())
        return sums


def train(kind: str, folder: Path, samples: bool = False, resume: Path | None = None) -> EngineTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no" if kind == "wrapped" else "steps",  # the Trainer alone cannot save two models
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        label_names=["labels"],
    )
    shard_on_cpu()
    rows = [torch.randint(3, 40, (10,), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = EngineTrainer(model=build(kind), args=arguments, train_dataset=data)
    trainer.samples = samples
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:  # else everything is small enough to stay whole
        plugin.deepspeed_config["zero_optimization"].update(stage3_param_persistence_threshold=0)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    require_sharding(trainer.model_wrapped)
    return trainer


def weights(trainer: EngineTrainer) -> dict[str, Tensor]:
    return full_tensors(trainer.model, [name for name, part in trainer.model.named_parameters() if part.requires_grad])


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def share(trainer: EngineTrainer) -> float:
    """The part of the parameters' elements that this rank keeps between steps."""
    parameters: list[Any] = list(trainer.model.parameters())
    local = sum(part.to_local().numel() if hasattr(part, "to_local") else part.numel() for part in parameters)
    return local / sum(getattr(part, "ds_numel", part.numel()) for part in parameters)


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    plain = train(kind, folder / "plain")
    start = weights(plain)
    report: dict[str, Any] = {
        "engine": type(plain.model_wrapped).__name__,
        "stage": plain.model_wrapped.zero_optimization_stage() if plain.is_deepspeed_enabled else None,
        "processes": plain.accelerator.num_processes,
        "share": share(plain),
        "shape_full": all(part.numel() > 0 for part in start.values()),
    }
    sampled = train(kind, folder / "sampled", samples=True)
    report["sampling_changes"] = worst(start, weights(sampled))
    report["forwards"] = len(sampled.inside)
    report["spread_inside"] = max(sampled.inside) - min(sampled.inside)
    if kind != "wrapped":
        resumed = train(kind, folder / "resumed", samples=True, resume=folder / "plain" / "checkpoint-2")
        report["resuming_changes"] = worst(start, weights(resumed))
    if plain.is_world_process_zero():
        torch.save(start, folder / "weights.pt")
        print("REPORT " + json.dumps(report), flush=True)
    leave_process_group()


if __name__ == "__main__":
    main()
