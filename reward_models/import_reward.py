"""Import a classifier of transformers, or an adapter of one, as a reward model with a card and a secant head.

    vgf-llm import-reward --reward_model path/to/classifier --dataset pairs.jsonl --output_dir outputs/imported
    vgf-llm generate --reward_model outputs/imported --prompt "..."

The weights stay where they are: the folder holds the small files, a pointer with a mark of the source, and the card.
The source is checked against the mark whenever the model is loaded. Ends with one line of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.check import read_pairs
from reward_models.checking.settings import ImportSettings
from reward_models.inputs import check_reward_model
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, stage, stages, working
from vgf_llm.console.screen import emit, say, show
from vgf_llm.errors import ConfigError, ModelError, OutputError
from vgf_llm.machine.device import resolve_device
from vgf_llm.models.inputs import check_base_model
from vgf_llm.runs.files import check_writable
from vgf_llm.settings.parse import parse

if TYPE_CHECKING:
    from reward_models.card import RewardCard
    from reward_models.checking.subject import Subject
    from vgf_llm.data.prompts import PreferencePair

_SMALL = ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
_NOT_SMALL = (
    "trainer_state.json",
    "training_args.json",
    "model.safetensors.index.json",
    "secant.json",
    "imported.json",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0; errors that are the user's to mend are VGFErrors."""
    (settings,) = parse(
        ImportSettings,
        argv=argv,
        prog="vgf-llm import-reward",
        description="Import a classifier or adapter as a reward model with a card.",
    )
    with library_output(settings.output_dir), stages(3 if settings.secant else 2):
        emit(json.dumps(run(settings)))
    return 0


def run(settings: ImportSettings) -> dict[str, Any]:
    """Import, measure and fit; returns the figures of the card.

    Raises:
        VGFError: The source is not a classifier, or pairs, prompts or output folder are unusable.
    """
    check_reward_model(settings.reward_model)
    check_base_model(settings.model_name_or_path)
    if settings.secant and not (settings.prompts and settings.validation_prompts):
        raise ConfigError(
            "secant needs prompts and validation_prompts: files of prompts for the fit and the measurement"
        )
    pairs = read_pairs(settings)
    load_libraries("reward_models.checking.report")
    from reward_models.checking.subject import load_subject
    from reward_models.classification import classifier_class
    from reward_models.sources import local_folder

    source = local_folder(settings.reward_model)
    if classifier_class(source) is None:
        raise ModelError(
            f"'{settings.reward_model}' is not a classifier; a reward model of ours has a card already and needs no "
            "import"
        )
    output = _checked_output(settings.output_dir, source)
    stage("loading the classifier and measuring it on pairs")
    with working(f"loading {settings.reward_model}"):
        subject = load_subject(source, settings.reward_outputs, resolve_device(settings.device))
    card = _measured(settings, subject, pairs.kept)
    stage("writing the folder")
    _copy_small_files(source, output, settings)
    _write_card(card, output)
    fitted: dict[str, Any] = {}
    if settings.secant:
        stage("fitting a secant head")
        fitted = {"secant": _fit_secant(settings, subject)}
    return {
        "output_dir": str(output),
        "accuracy": card.accuracy,
        "length_controlled_accuracy": card.length_controlled_accuracy,
        "length_correlation": card.length_correlation,
        "score_mean": card.score_mean,
        "score_std": card.score_std,
        "fidelity": None if card.fidelity is None else card.fidelity["spearman"],
    } | fitted


def _checked_output(name: str, source: str) -> Path:
    """Return the output folder; refuse the source and folders that hold another model."""
    output = Path(check_writable(name))
    if output.resolve() == Path(source).resolve():
        raise OutputError(f"output_dir '{name}' is the classifier's own folder; name another one")
    weights = [path.name for path in output.glob("*.safetensors") if path.name != "secant.safetensors"]
    if weights:
        raise OutputError(f"output_dir '{name}' holds a model ({weights[0]}); name another folder")
    return output


def _measured(settings: ImportSettings, subject: Subject, pairs: list[PreferencePair]) -> RewardCard:
    """Score the pairs and return the card."""
    from reward_models.card import RewardCard, pair_figures
    from reward_models.checking.reading import check_longest
    from vgf_llm.models.architecture import max_positions, num_layers
    from vgf_llm.models.loading import fingerprint

    rows = subject.rows(pairs)
    _, fits = check_longest(subject, rows)
    n = len(pairs)
    both = [fits[at] and fits[at + n] for at in range(n)]
    kept = [pair for pair, fit in zip(pairs, both, strict=True) if fit]
    rows = [row for row, fit in zip(rows, both * 2, strict=True) if fit]
    if not kept:
        raise ModelError(f"all {n} pairs are longer than the positions of {settings.reward_model}; give shorter ones")
    with working(f"scoring {len(kept)} pairs"):
        scores = subject.scores(rows).tolist()
    half = len(kept)
    lengths = [len(row.ids) for row in rows]
    figures = pair_figures(scores[:half], scores[half:], [pair.margin for pair in kept], lengths)
    prints, config = fingerprint(subject.tokenizer), subject.model.config
    dropped = {"longer than the model": n - half} if n > half else {}
    return RewardCard(
        base_model=settings.model_name_or_path,
        num_layers=num_layers(config.get_text_config()),
        pooling="last",
        adapter=(Path(subject.name) / "adapter_config.json").is_file(),
        tokenizer_sha256=prints.tokenizer,
        template_sha256=prints.template,
        chat_template=bool(subject.tokenizer.chat_template),
        max_length=max_positions(config) or 0,
        train_pairs=0,
        held_out_pairs=half,
        imported_from=settings.reward_model,
        fidelity=_fidelity(settings, subject, kept),
        dropped=dropped,
        data_files={settings.dataset: _digest(settings)} if settings.dataset else {"built-in pairs": "-"},
        **figures,
    )


def _digest(settings: ImportSettings) -> str:
    from reward_models.pairs import file_digest

    return file_digest(str(settings.dataset), settings.split)


def _fidelity(settings: ImportSettings, subject: Subject, pairs: list[PreferencePair]) -> dict[str, float] | None:
    """Measure gradient fidelity on the base model's shortlists, where it has the same token ids."""
    from reward_models.assess import measure_fidelity
    from reward_models.checking.subject import response_ids
    from reward_models.classification import same_ids
    from vgf_llm.models.loading import load_causal_lm, load_tokenizer

    if subject.value is None or not settings.fidelity_responses:
        say(f"gradient fidelity is not measured: {subject.why_no_value or 'fidelity_responses is 0'}")
        return None
    if not same_ids(subject.tokenizer, load_tokenizer(settings.model_name_or_path)):
        say(f"gradient fidelity is not measured: {settings.model_name_or_path!r} has other token ids")
        return None
    with working(f"loading the base model {settings.model_name_or_path}"):
        lm = load_causal_lm(settings.model_name_or_path, device=str(subject.value.device))
    groups = [(prompt, [chosen, rejected]) for prompt, chosen, rejected in (response_ids(subject, p) for p in pairs)]
    try:
        found = measure_fidelity(subject.value, lm, groups, subject.tokenizer, responses=settings.fidelity_responses)
    except ValueError as error:
        say(f"warning: gradient fidelity is not on the card ({error})")
        return None
    return found.to_dict()


def _copy_small_files(source: str, output: Path, settings: ImportSettings) -> None:
    """Point to the weights, and copy configuration and tokenizer; without config.json, the last, nothing loads."""
    from reward_models.sources import imported_outputs, weights_folder, write_pointer

    for name in ("config.json", "adapter_config.json", "secant.json", "secant.safetensors"):  # of an earlier import
        (output / name).unlink(missing_ok=True)
    outputs = settings.reward_outputs or imported_outputs(source)
    write_pointer(output, str(weights_folder(source).resolve()), outputs)  # the weights of an import lie elsewhere
    found = {path.name: path for pattern in _SMALL for path in Path(source).glob(pattern) if path.is_file()}
    for name in sorted(found, key=lambda one: one in ("adapter_config.json", "config.json")):
        if name not in _NOT_SMALL and not name.startswith("reward_card"):
            shutil.copyfile(found[name], output / name)


def _write_card(card: RewardCard, output: Path) -> None:
    from rich.table import Table

    from reward_models.card import card_rows, write_card

    write_card(card, output)
    table = Table(title=f"Reward model in {output}", show_header=False)
    for name, text in card_rows(card):
        table.add_row(name, text)
    show(table)


def _fit_secant(settings: ImportSettings, subject: Subject) -> dict[str, Any]:
    """Fit a secant head over the classifier's own gradient; returns its figures."""
    from reward_models import train_secant
    from reward_models.secant_settings import SecantScript, SecantTraining
    from vgf_llm.settings import SamplingSettings

    if subject.value is None:
        raise ModelError(f"a secant head cannot be fitted to '{settings.reward_model}': {subject.why_no_value}")
    script = SecantScript(
        reward_model=settings.output_dir,
        model_name_or_path=settings.model_name_or_path,
        reward_outputs=settings.reward_outputs,
        prompts=str(settings.prompts),
        validation_prompts=str(settings.validation_prompts),
        device=settings.device,
    )
    sampling = SamplingSettings(max_new_tokens=settings.max_new_tokens)
    return train_secant.run(script, SecantTraining(base="gradient"), sampling)


if __name__ == "__main__":
    sys.exit(run_main(main))
