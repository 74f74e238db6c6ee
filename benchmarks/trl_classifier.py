"""A classifier that TRL trained on real dialogues, from its training to budgets, beside a reward model of ours.

    python -m recipes.smollm2_dialogue.make_data --source FILE
    python -m benchmarks.trl_classifier [--record]

Both learn from the same pairs (part A of `recipes/smollm2_dialogue`, responses cut at 32 tokens) on the same six layers
of the embedded base: ours by `recipes/smollm2_dialogue/reward.yaml`, the other by TRL's RewardTrainer at its default
rate.
The classifier is imported (`vgf-llm import-reward`), and both get a secant head on prompts of the training pairs. Then
clouds of eight are written to unseen dialogues, as in `benchmarks.one_pass`: gain of the model's own score and of the
held-out model's (gold) over plain samples, and eta. ``picked`` is the gold of the response that the model picks, less
that of its pick of eight plain samples. Seeds are those of the recipes, and 0 for TRL. Stages whose result is there are
not run again. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vgf_llm.cli import run_main
from vgf_llm.errors import DataError
from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import check_writable, write_json_atomic

RECORD = Path("docs/results/trl_classifier.json")
_RECIPE, _OUTPUTS = "recipes/smollm2_dialogue", Path("outputs/smollm2_dialogue")
_DATA = _OUTPUTS / "data"
LAYERS, RESPONSE_TOKENS, LONGEST, SEED = 6, 32, 512, 0
_FIT = {
    "prompts": _DATA / "preferences_reward.jsonl",
    "validation_prompts": _DATA / "prompts_validation.jsonl",
    "num_prompts": 48,
    "num_validation_prompts": 16,
    "substitutions": 48,
    "validation_substitutions": 80,
    "max_new_tokens": RESPONSE_TOKENS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are missing and print the figures."""
    arguments = _arguments(argv)
    if arguments.stage == "train":
        train()
        return 0
    if not _DATA.is_dir():
        raise DataError(f"'{_DATA}' is not there; run `python -m {_RECIPE.replace('/', '.')}.make_data --source FILE`")
    if arguments.record:
        check_writable(str(RECORD.parent))
    folders = {"ours": _OUTPUTS / "reward", "TRL": _OUTPUTS / "imported"}
    for done, command in _stages(folders):
        if not done.exists():
            print(f"running: {' '.join(command)}", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    found = {name: _figures(name, folder, arguments) for name, folder in folders.items()}
    result = {name: {"fidelity": own["secant"]["spearman_after"], "arms": own["arms"]} for name, own in found.items()}
    if arguments.record:
        command_line = "python -m benchmarks.trl_classifier " + " ".join(sys.argv[1:] if argv is None else argv)
        record = {"models": found, "seed": SEED, "hardware": hardware(), "command": command_line.strip()}
        write_json_atomic(RECORD, record)
    print(json.dumps(result))
    return 0


def _stages(folders: dict[str, Path]) -> list[tuple[Path, list[str]]]:
    """Return (file that is there at the end, module and its arguments) of every stage."""
    ours, imported = folders["ours"], folders["TRL"]
    classifier, held_out = _OUTPUTS / "classifier", _OUTPUTS / "held_out"
    fit = [str(part) for key, value in _FIT.items() for part in (f"--{key}", value)]
    pairs = str(_DATA / "preferences_reward_validation.jsonl")
    imports = ["--reward_model", str(classifier), "--dataset", pairs, "--limit", "1000", "--output_dir", str(imported)]
    return [
        (ours / "reward_card.json", ["reward_models.train", "--config", f"{_RECIPE}/reward.yaml"]),
        (held_out / "reward_card.json", ["reward_models.train", "--config", f"{_RECIPE}/reward_held_out.yaml"]),
        (classifier / "model.safetensors", ["benchmarks.trl_classifier", "--stage", "train"]),
        (imported / "reward_card.json", ["reward_models.import_reward", *imports]),
        (ours / "secant.json", ["reward_models.train_secant", "--reward_model", str(ours), *fit]),
        (
            imported / "secant.json",
            ["reward_models.train_secant", "--reward_model", str(imported), "--base", "gradient", *fit],
        ),
    ]


def train() -> None:
    """Train the classifier with TRL on the training pairs of part A; its folder appears when it is whole."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    from vgf_llm.data.dialogue import as_messages
    from vgf_llm.data.prompts import load_preferences
    from vgf_llm.models.loading import embedded_model_folder

    set_seed(SEED)
    base = embedded_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(base)

    def cut(response: str) -> list[dict[str, str]]:
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        return [{"role": "assistant", "content": tokenizer.decode(ids[:RESPONSE_TOKENS])}]

    pairs = load_preferences(str(_DATA / "preferences_reward.jsonl")).pairs
    rows = [{"prompt": as_messages(p.prompt), "chosen": cut(p.chosen), "rejected": cut(p.rejected)} for p in pairs]
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, num_hidden_layers=LAYERS, dtype=torch.float32
    )
    output, staging = _OUTPUTS / "classifier", _OUTPUTS / "classifier_run" / "final"
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(_OUTPUTS / "classifier_run"),
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_length=LONGEST,
            seed=SEED,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(staging))
    staging.rename(output)


def _figures(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the clouds of a model; returns its card's and secant head's figures and those of the arms."""
    from benchmarks.one_pass import summary
    from benchmarks.one_pass_clouds import Task, run_task
    from reward_models.card import read_card

    task = Task(
        str(folder),
        str(_DATA / "prompts_test.jsonl"),
        str(_DATA / "prompts_validation.jsonl"),
        f"{_RECIPE.replace('/', '.')}.gold:held_out",
        RESPONSE_TOKENS,
    )
    clouds = argparse.Namespace(directions=["prior", "lookahead"], prompts=arguments.prompts)
    found = summary(run_task(task, Path(arguments.work, name.lower()), clouds))
    for arm, figures in found["arms"].items():
        print(f"{name:5} {arm:14} {figures}", file=sys.stderr)
    card = read_card(folder)
    secant = json.loads((folder / "secant.json").read_text(encoding="utf-8"))
    return {
        "accuracy": card.accuracy,
        "accuracy_interval": card.accuracy_interval,
        "length_controlled_accuracy": card.length_controlled_accuracy,
        "gradient_fidelity": card.fidelity,
        "secant": secant,
        **found,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24, help="unseen dialogues")
    parser.add_argument("--work", default="outputs/trl_classifier", help="folder for the texts")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD} too")
    parser.add_argument("--stage", choices=["train"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
