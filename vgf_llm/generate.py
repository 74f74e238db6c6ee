"""``vgf-llm generate``: answer prompts under a transport budget, one JSON object a line.

    vgf-llm generate --reward_model outputs/reward --prompt "Write one sentence about the sea." --budget.nats 4
    cat prompts.txt | vgf-llm generate --reward_model outputs/reward --output answers.jsonl

``--budget.steps 0`` is best-of-N. A line holds the prompt, the response, its value, the best original with its value
(what best-of-N would have answered), the sample that the response was moved from, and the distance between the two:
nats while decoding, tokens changed, displacement in nearest-token distances.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vgf_llm.cli import run_main
from vgf_llm.config import parse
from vgf_llm.errors import ConfigError, NonFiniteError, OutputError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.io import append_jsonl, check_writable
from vgf_llm.progress import track
from vgf_llm.settings import DecoderName, ModelSettings, SamplingSettings


@dataclass(frozen=True)
class GenerateSettings:
    """Prompts, particles, budget and output."""

    prompt: list[str] = field(default_factory=list)
    """Prompts given here; a single text may stand without brackets."""
    prompts: str | None = None
    """Prompt file (.jsonl, .json, .csv, .parquet, .txt) or hub dataset; without it and --prompt, lines of stdin."""
    prompt_column: str = "prompt"
    """Column of the prompt file."""
    num_prompts: int | None = None
    """Prompts used, from the first; all when unset."""
    budget: TransportBudget = field(default_factory=TransportBudget)
    """Transport budget; steps 0 is best-of-N."""
    decoder: DecoderName = "prior"
    """How moved particles become tokens."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """Options of the decoder, by name; its class lists them."""
    num_particles: int = 8
    """Responses a prompt that are sampled and moved, at least 1."""
    draws: int = 3
    """Texts decoded from each moved response, at least 1; alike with the decoder nearest, chains of their own with edit
    and pivot."""
    select: Literal["max", "softmax", "random"] = "max"
    """The response returned: best by value, drawn by softmax of value / budget.temperature, or any of the pool."""
    seed: int = 0
    """Seed; a prompt's answer depends on it and on the prompt's position, not on the batch."""
    batch_prompts: int = 4
    """Prompts a batch, at least 1."""
    output: str | None = None
    """File for the JSON lines; standard output when unset. An existing file is refused."""

    def __post_init__(self) -> None:
        """Validate ranges.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if self.num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {self.num_particles}")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts must be null or at least 1, got {self.num_prompts}")
        if self.batch_prompts < 1:
            raise ValueError(f"batch_prompts must be at least 1, got {self.batch_prompts}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings, models, sampling = parse(
        GenerateSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm generate",
        description="Answer prompts under a transport budget.",
    )
    output = _checked_output(settings.output)
    for rows in run(settings, models, sampling):
        if output is not None:
            append_jsonl(output, rows)
            continue
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0


def run(
    settings: GenerateSettings, models: ModelSettings, sampling: SamplingSettings
) -> Iterator[list[dict[str, Any]]]:
    """Yield the answers of each batch of prompts.

    Raises:
        VGFError: If prompts, models or options do not fit; NonFiniteError names the prompt.
    """
    prompts = _prompts(settings)
    from vgf_llm.pipeline import encode_prompts, load_pipeline, make_decoder, prompt_text
    from vgf_llm.sampling import TransformersSampler
    from vgf_llm.text import ImplicitPolicy, row_seeds

    pipeline = load_pipeline(models, sampling)
    encoded = encode_prompts(pipeline, prompts)
    policy = ImplicitPolicy(
        TransformersSampler(pipeline.reference),
        pipeline.value,
        make_decoder(settings.decoder, pipeline.reference, pipeline.value, settings.decoder_options),
        settings.budget,
        select=settings.select,
        gradient=pipeline.gradient,
        draws=settings.draws,
    )
    print(
        f"answering {len(encoded)} prompts, {settings.num_particles} particles of {settings.draws} texts each",
        file=sys.stderr,
    )
    starts = range(0, len(encoded), settings.batch_prompts)
    for start in track(starts, "generating"):
        indices = list(range(start, min(start + settings.batch_prompts, len(encoded))))
        try:
            outcome = policy([encoded[i] for i in indices], row_seeds(settings.seed, indices, settings.num_particles))
        except NonFiniteError as error:
            index = indices[error.group]
            raise NonFiniteError(f"prompt {index}: {error}", group=index, step=error.step) from error
        yield _rows([prompt_text(prompts[i]) for i in indices], outcome, pipeline.tokenizer)


def _rows(prompts: list[str], outcome: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return one JSON object a prompt."""
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
                "original": originals[b][best],
                "original_value": round(float(outcome.original_values_BN[b, best]), 4),
                "source": sources[b][0],
                "rounds": rounds,
                "distance": {
                    "nats": None if nats != nats else round(nats, 4),
                    "changed_tokens": int(changed_B[b]),
                    "displacement": round(float(outcome.displacement_RBN[:rounds, b, text].sum()), 4),
                },
            }
        )
    return rows


def _prompts(settings: GenerateSettings) -> list[Any]:
    if settings.prompt and settings.prompts:
        raise ConfigError("prompt and prompts are both set; give one of them")
    if settings.prompt:
        found: list[Any] = list(settings.prompt)
    elif settings.prompts:
        from vgf_llm.data import load_prompts

        return load_prompts(settings.prompts, settings.prompt_column, limit=settings.num_prompts)
    else:
        if sys.stdin.isatty():
            print("reading prompts from standard input, one a line (end with Ctrl-D)", file=sys.stderr)
        found = [line.strip() for line in sys.stdin if line.strip()]
    if not found:
        raise ConfigError("no prompt given; use --prompt, --prompts or standard input")
    return found[: settings.num_prompts]


def _checked_output(output: str | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    check_writable(path.parent)
    if path.exists():
        raise OutputError(f"{path} exists; name another file or remove it")
    return path


if __name__ == "__main__":
    sys.exit(run_main(main))
