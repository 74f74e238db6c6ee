"""What the cost benchmark runs: a reference and a value on a few prompts, with every response at its full length.

No token ends a response here, so that T tokens are T tokens in every arm and repetition, and each run makes a reference
of its own, so that prompts are processed inside the measured time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.decoder_arms import CONTROL_LEVEL, decodings
from reward_models.modelling import RewardModel
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy, Outcome
from vgf_llm.errors import ConfigError
from vgf_llm.evaluation.arms import Arm
from vgf_llm.evaluation.flops import PromptWork, Sizes, arm_flops
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.particles import GradientSource, exact_gradient, token_spacing
from vgf_llm.text.responses import Responses
from vgf_llm.text.sampler import ReferenceSampler

PROMPTS_FILE = "recipes/smollm2_sentiment/data/prompts_test.jsonl"
PARTICLES, TOKENS, TINY_TOKENS = 8, 24, 6
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class CostModels:
    """A reference and a value, the prompts they answer, and what is needed to count."""

    model: PreTrainedModel
    value: RewardModel
    gradient: GradientSource
    prompts: list[list[int]]
    pad_id: int
    alpha: float
    sizes: Sizes
    length_unit: float
    tokens: int = TOKENS

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        value: RewardModel,
        prompts: list[list[int]],
        *,
        gradient: GradientSource = exact_gradient,
        pad_id: int = 0,
        alpha: float = 0.1,
        tokens: int = TOKENS,
    ) -> CostModels:
        """Count the parameters and measure the length unit, which no run should pay for."""
        unit = token_spacing(value.embedding_table_VD)
        return cls(model, value, gradient, prompts, pad_id, alpha, Sizes.of(model, value), unit, tokens)

    def reference(self, tokens: int | None = None) -> TorchReference:
        """Return a reference that has seen no prompt and whose responses all have ``tokens`` tokens."""
        return TorchReference(self.model, SamplingSettings(max_new_tokens=tokens or self.tokens), (), self.pad_id)

    def seeds(self, count: int) -> torch.Tensor:
        """Return the seeds of ``count`` responses a prompt."""
        return row_seeds(0, list(range(len(self.prompts))), count)

    def sample(self, count: int, tokens: int | None = None) -> Responses:
        """Draw plain samples."""
        return ReferenceSampler(self.reference(tokens)).sample(self.prompts, self.seeds(count))

    def answer(self, arm: Arm, tokens: int | None = None) -> Outcome:
        """Sample, transport, decode and select as the arm says."""
        policy = make_policy(
            ImplicitPolicy,
            self.reference(tokens),
            self.value,
            arm.transport,
            arm.decoder,
            arm.decoder_options,
            draws=arm.draws,
            select=arm.select,
            gradient=self.gradient,
            length_unit=self.length_unit,
        )
        return policy(self.prompts, self.seeds(arm.num_particles))

    def tflops(self, arm: Arm, outcome: Outcome) -> float:
        """Return the counted TFLOP of an outcome, over all prompts."""
        sampled_B = outcome.originals.lengths_BN.sum(-1).tolist()
        flops = [
            arm_flops(arm, self.sizes, len(prompt), sampled_B[b], PromptWork.of(outcome.work, b))
            for b, prompt in enumerate(self.prompts)
        ]
        return sum(flops) / 1e12

    def sampling_tflops(self, responses: Responses) -> float:
        """Return the counted TFLOP of plain samples, over all prompts."""
        tokens = int(responses.lengths_BN.sum()) + sum(map(len, self.prompts))
        return 2 * self.sizes.reference * tokens / 1e12


def cost_arms(names: list[str], alpha: float, particles: int = PARTICLES) -> list[Arm]:
    """Return best-of-N and the named decoders with the bake-off's budgets, all with the same particles.

    ``prior`` comes twice, with one and with three texts of each particle.

    Raises:
        ConfigError: A decoder has no such name.
    """
    found = decodings(alpha)
    arms = [Arm(name=f"best-of-{particles}", num_particles=particles)]
    for name in names:
        if (key := name.replace("_", " ")) not in found:
            raise ConfigError(f"decoders: {name!r} is no decoder here; there are {', '.join(found)}")
        for draws in (1, 3) if key == "prior" else (1,):
            label = f"{key}, {draws} draw{'s' if draws > 1 else ''}" if key == "prior" else key
            arms.append(found[key].arm(CONTROL_LEVEL, name=label, num_particles=particles, draws=draws))
    return arms


def real_models(arguments: argparse.Namespace) -> CostModels:
    """Load the default base model and the reward model, with the first prompts of the sentiment recipe."""
    from benchmarks.decoders import acceptance_temperature
    from vgf_llm.answering.pipeline import encode_prompts, load_pipeline
    from vgf_llm.data.prompts import load_prompts
    from vgf_llm.settings import ModelSettings

    settings = ModelSettings(reward_model=arguments.reward_model, dtype=arguments.dtype, device="cpu")
    pipeline = load_pipeline(settings, SamplingSettings(max_new_tokens=TOKENS))
    prompts = encode_prompts(pipeline, load_prompts(PROMPTS_FILE, "prompt", limit=arguments.prompts))
    return CostModels.of(
        pipeline.reference.model,
        pipeline.value,
        prompts,
        gradient=pipeline.gradient,
        pad_id=pipeline.reference.pad_id,
        alpha=acceptance_temperature(settings),
    )


def random_models(
    shape: dict[str, Any], vocabulary: int, *, layers: int, dtype: str, prompts: int = 1, tokens: int = TOKENS
) -> CostModels:
    """Return models of random weights, the value with half of the reference's layers and its exact gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    value = RewardModel.from_base(model, num_layers=layers // 2, dtype=getattr(torch, dtype), pooling="mean").freeze()
    ids = torch.randint(1, vocabulary, (prompts, 20), generator=torch.Generator().manual_seed(1))
    return CostModels.of(model, value, ids.tolist(), tokens=tokens)
