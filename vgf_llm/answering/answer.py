"""Prompts in, answers under a transport budget out: what ``generate`` and ``transport`` share.

Data goes one way: prompts -> batches -> the implicit policy -> one row a prompt. A row holds the response and its
value, the best original with its value (what best-of-N would have answered), the sample that the response was moved
from with its value, whether the response ended by itself, and the distance between sample and response. What was
written in one pass has neither original nor sample: these are null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from reward_models.inputs import check_models
from vgf_llm.console.progress import load_libraries, stage, track, working
from vgf_llm.engines.inputs import check_engine
from vgf_llm.errors import NonFiniteError
from vgf_llm.settings import AnswerSettings, ModelSettings, SamplingSettings, check_decoder_options
from vgf_llm.settings.shared import check_backend

Row = dict[str, Any]


def look_at_inputs(settings: AnswerSettings, models: ModelSettings) -> None:
    """Look at everything but the prompts that can be judged without a model.

    Raises:
        VGFError: Something is unusable.
    """
    check_models(models)
    check_decoder_options(settings.decoder, settings.decoder_options)
    check_backend(settings.decoder, settings.backend)
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
        sampling: The reference distribution.
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
    from vgf_llm.answering.one_pass import Directions, calibrate
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
            directions=Directions(pipeline.tokenizer, models.reward_model),
        )
        calibrate(policy, encoded)
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
    if outcome.one_pass:
        return [_streamed_row(prompt, outcome, b, selected[b][0]) for b, prompt in enumerate(prompts)]
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


def _streamed_row(prompt: str, outcome: Any, b: int, response: str) -> Row:
    """Return the row of a text that was drawn in one pass: it was moved from no sample."""
    text = int(outcome.selected_index_B[b]) - outcome.transported.tokens_BNT.shape[1]
    return {
        "prompt": prompt,
        "response": response,
        "value": round(float(outcome.selected_values_B[b]), 4),
        "ended": bool(outcome.selected.eos_BNT.any(-1)[b, 0]),
        "original": None,
        "original_value": None,
        "source": None,
        "source_value": None,
        "rounds": 1,
        "distance": {
            "nats": round(float(outcome.nats_BN[b, text]), 4),
            "changed_tokens": None,
            "displacement": None,
        },
    }
