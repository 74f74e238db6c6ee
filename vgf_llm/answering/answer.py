"""Prompts in, answers under a transport budget out: what ``generate`` and ``transport`` share.

Data goes one way: prompts -> batches -> the implicit policy -> one row a prompt. A row holds the response and its
value, the best original with its value (what best-of-N would have answered), the sample that the response was moved
from with its value, whether the response ended by itself, and the distance between sample and response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from reward_models.inputs import check_models
from vgf_llm.console.progress import load_libraries, stage, track, working
from vgf_llm.engines.inputs import check_engine
from vgf_llm.errors import NonFiniteError, require_sampling_seed
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import (
    BackendName,
    DecoderName,
    EngineSettings,
    ModelSettings,
    SamplingSettings,
    check_decoder_options,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class ImplicitPolicySettings:
    """Particles, budget, decoder and selection."""

    budget: TransportBudget = field(default_factory=TransportBudget)
    """Transport budget; steps 0 is best-of-N."""
    decoder: DecoderName = "prior"
    """How moved particles become tokens."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """Options of the decoder, by name; its class lists them."""
    num_particles: int = 8
    """Responses per prompt that are sampled and moved, at least 1."""
    draws: int = 3
    """Texts decoded from each moved response, at least 1; alike with the decoder nearest, chains of their own with edit
    and pivot."""
    select: Literal["max", "softmax", "random"] = "max"
    """The response returned: best by value, drawn by softmax of value / budget.temperature, or any of the pool."""

    def __post_init__(self) -> None:
        """Validate ranges.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if self.num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {self.num_particles}")


@dataclass(frozen=True)
class AnswerSettings(ImplicitPolicySettings):
    """Prompts, particles and budget."""

    prompts: str | None = None
    """Prompt file (.jsonl, .json, .csv, .parquet, .txt), or a data set of the hub."""
    prompt_column: str = "prompt"
    """Column of the prompt file, text or messages."""
    system_column: str = field(default="system", kw_only=True)
    """Column of a system turn that goes before the prompt, where rows have it."""
    num_prompts: int | None = None
    """Prompts used, from the first; all when unset."""
    seed: int = 0
    """Seed; a prompt's answer depends on it and on the prompt's position, not on the batch."""
    batch_prompts: int = 4
    """Prompts per batch, at least 1."""
    backend: BackendName = "transformers"
    """What runs the base model: transformers in this process, or a vllm engine."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """The vllm engine."""

    def __post_init__(self) -> None:
        """Validate ranges.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        super().__post_init__()
        require_sampling_seed("seed", self.seed)
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts must be null or at least 1, got {self.num_prompts}")
        if self.batch_prompts < 1:
            raise ValueError(f"batch_prompts must be at least 1, got {self.batch_prompts}")


def look_at_inputs(settings: AnswerSettings, models: ModelSettings) -> None:
    """Look at everything but the prompts that can be judged without a model.

    Raises:
        VGFError: Something is unusable.
    """
    check_models(models)
    check_decoder_options(settings.decoder, settings.decoder_options)
    check_engine(settings.backend, settings.engine.url)


def answer(
    settings: AnswerSettings,
    models: ModelSettings,
    sampling: SamplingSettings,
    prompts: Sequence[Any],
    indices: Sequence[int] | None = None,
    description: str = "generating",
) -> Iterator[tuple[list[int], list[Row]]]:
    """Yield the answers of each batch of prompts.

    Args:
        settings: Budget, particles, decoder, seed and batch size; its prompt file is not read here.
        models: Base model and reward model.
        sampling: The reference law.
        prompts: Every prompt, as text or messages; a place in this list decides a prompt's noise.
        indices: Places of the prompts to answer; all when None.
        description: Shown before the progress.

    Yields:
        The places of a batch and one row for each.

    Raises:
        VGFError: If prompts, models or options do not fit; NonFiniteError names the prompt.
    """
    load_libraries("vgf_llm.answering.pipeline", "vgf_llm.text")
    from vgf_llm.answering.assemble import make_policy
    from vgf_llm.answering.implicit_policy import ImplicitPolicy
    from vgf_llm.answering.pipeline import encode_prompts, load_pipeline, prompt_text
    from vgf_llm.engines.backends import backend_named
    from vgf_llm.text import row_seeds

    with working(f"loading the base model {models.model_name_or_path} and the reward model {models.reward_model}"):
        pipeline = load_pipeline(models, sampling, backend_named(settings.backend, settings.engine))
    with closing(pipeline):
        encoded = encode_prompts(pipeline, list(prompts))
        todo = list(range(len(encoded)) if indices is None else indices)
        policy = make_policy(
            ImplicitPolicy,
            pipeline.reference,
            pipeline.value,
            settings.budget,
            settings.decoder,
            settings.decoder_options,
            draws=settings.draws,
            select=settings.select,
            gradient=pipeline.gradient,
        )
        asked = "1 prompt" if len(todo) == 1 else f"{len(todo)} prompts"
        stage(f"answering {asked}, {settings.num_particles} particles of {settings.draws} texts each")
        batches = [todo[at : at + settings.batch_prompts] for at in range(0, len(todo), settings.batch_prompts)]
        for batch in track(batches, description, unit="prompts", size=len):
            try:
                outcome = policy([encoded[i] for i in batch], row_seeds(settings.seed, batch, settings.num_particles))
            except NonFiniteError as error:
                index = batch[error.group]
                raise NonFiniteError(f"prompt {index}: {error}", group=index, step=error.step) from error
            yield batch, outcome_rows([prompt_text(prompts[i]) for i in batch], outcome, pipeline.tokenizer)


def outcome_rows(prompts: list[str], outcome: Any, tokenizer: Any) -> list[Row]:
    """Return what came of each prompt as one JSON object, as this module's header lists it."""
    import torch

    from vgf_llm.text.responses import changed_tokens

    n = outcome.originals.tokens_BNT.shape[1]
    best_B = outcome.original_values_BN.argmax(1)
    originals, selected = outcome.originals.texts(tokenizer), outcome.selected.texts(tokenizer)
    # The pool holds the N originals first, then M = N * draws texts of every round, those of a particle side by side.
    m = outcome.transported.tokens_BNT.shape[1]
    after_B = outcome.selected_index_B - n  # below 0: an original
    particle_B = torch.where(after_B < 0, outcome.selected_index_B, after_B % m // (m // n))
    round_B, text_B = torch.where(after_B < 0, 0, after_B // m + 1), (after_B % m).clamp(min=0)
    source = outcome.originals.take(particle_B.unsqueeze(1))
    sources, changed_B = source.texts(tokenizer), changed_tokens(source, outcome.selected)[:, 0]
    ended_B = outcome.selected.eos_BNT.any(-1)[:, 0]
    rows = []
    for b, prompt in enumerate(prompts):
        best, text = int(best_B[b]), int(text_B[b])
        rounds = int(round_B[b])
        nats = float(outcome.nats_RBN[:rounds, b, text].sum())
        rows.append(
            {
                "prompt": prompt,
                "response": selected[b][0],
                "value": round(float(outcome.selected_values_B[b]), 4),
                "ended": bool(ended_B[b]),
                "original": originals[b][best],
                "original_value": round(float(outcome.original_values_BN[b, best]), 4),
                "source": sources[b][0],
                "source_value": round(float(outcome.original_values_BN[b, int(particle_B[b])]), 4),
                "rounds": rounds,
                "distance": {
                    "nats": None if nats != nats else round(nats, 4),
                    "changed_tokens": int(changed_B[b]),
                    "displacement": round(float(outcome.displacement_RBN[:rounds, b, text].sum()), 4),
                },
            }
        )
    return rows
