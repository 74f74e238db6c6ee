"""Makes files.tar.gz: what a version of this project left on disk, for later versions to go on with and to load.

    git clone . ../old && git -C ../old checkout 32572dd
    cd ../old && PYTHONPATH=$PWD python <here>/tests/compatibility/make_files.py <here>/tests/compatibility/files.tar.gz

It runs the commands of the checkout it is started in, on a tiny model. Every run is stopped half-way: what came after
its middle checkpoint (or row) is removed. Results stay in their folders, for comparison; `expected/` holds what else
the whole runs ended with. Paths in the files are relative to the archive's root: the tests run there. The files in the
archive are of commit 32572dd.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BASE = ["--model_name_or_path", "base"]
FLOAT32 = ["--dtype", "float32"]
TRAINS = [*BASE, *FLOAT32, "--bf16", "false", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
SCORES = [
    *TRAINS,
    *("--num_layers", "1", "--max_length", "32", "--per_device_train_batch_size", "2", "--learning_rate", "1.0e-2"),
    *("--fidelity_responses", "2", "--fidelity_substitutions", "12"),
]
POLICY = [
    *TRAINS,
    *("--prompts", "prompts.jsonl", "--max_new_tokens", "6", "--top_k", "20", "--num_particles", "2"),
    *("--per_device_train_batch_size", "2", "--learning_rate", "1.0e-2", "--lora_alpha", "8"),
]
LEARNED = ["--value", "learned", "--learned_value.num_layers", "1", "--learned_value.lora_r", "0"]
ANSWERS = [
    *BASE,
    *FLOAT32,
    *("--device", "cpu", "--prompts", "prompts.jsonl", "--reward_model", "reward", "--max_new_tokens", "6"),
    *("--num_prompts", "4", "--batch_prompts", "2", "--num_particles", "2", "--draws", "1"),
]
COMMANDS = {
    "reward": ["reward_models.train", "--train_dataset", "pairs.jsonl", *SCORES],
    "reward_lora": ["reward_models.train", "--train_dataset", "pairs.jsonl", *SCORES, "--lora_r", "2"],
    "value": ["reward_models.train_value", "--train_dataset", "logged.jsonl", *SCORES],
    "secant": [
        *("reward_models.train_secant", "--reward_model", "reward", *BASE, *FLOAT32, "--device", "cpu"),
        *("--prompts", "prompts.jsonl", "--validation_prompts", "unseen.jsonl", "--hidden", "8", "--steps", "10"),
        *("--substitutions", "6", "--validation_substitutions", "12", "--max_new_tokens", "6", "--shortlist", "10"),
    ],
    "policy_lora": ["vgf_llm.train", *POLICY, "--rewards", "reward", "--lora_r", "2"],
    "policy_full": ["vgf_llm.train", *POLICY, "--rewards", "length_words", "--lora_r", "0", *LEARNED],
    "evaluation": [
        *("vgf_llm.evaluate", *ANSWERS, "--gold", "length_words", "--best_of", "[2]", "--budgets", "[{nats: 1.0}]"),
    ],
    "transport": ["vgf_llm.transport", *ANSWERS],
    "control": [
        *("vgf_llm.control.train", "--data", "walk.hdf5", "--device", "cpu", "--offline_steps", "4"),
        *("--save_every_steps", "2", "--log_every_steps", "1", "--batch_size", "16", "--num_particles", "2"),
        *("--clone_hidden", "[8]", "--critic_hidden", "[8]", "--save_total_limit", "null"),
    ],
}
"""Module and arguments of every run; its output folder has the run's name."""

NOUNS = ("dog", "cat", "sea", "rain", "tree", "house", "train", "night")


def write_inputs(folder: Path) -> None:
    """Write a model of 16 units and two layers, its tokenizer, and data."""
    import h5py
    import numpy as np

    from tests.conftest import build_llama, build_tokenizer

    build_llama(width=16).save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    tables = {
        "prompts": [{"prompt": f"write one sentence about the {noun}"} for noun in NOUNS[:4]],
        "unseen": [{"prompt": f"write one sentence about the {noun}"} for noun in NOUNS[4:6]],
        "pairs": [{"prompt": f"the {n}", "chosen": f"the {n} is good", "rejected": f"the {n} is bad"} for n in NOUNS],
        "logged": [{"prompt": f"the {n}", "response": f"is {w}", "reward": r} for n in NOUNS
                   for w, r in (("good", 1.0), ("bad", -1.0))],
    }  # fmt: skip
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draws = np.random.default_rng(0)
    ends = np.arange(1, 61) % 10 == 0
    with h5py.File(folder / "walk.hdf5", "w") as file:
        file["observations"] = draws.uniform(-1, 1, (60, 2)).astype(np.float32)
        file["actions"] = draws.uniform(-1, 1, (60, 2)).astype(np.float32)
        file["rewards"] = draws.uniform(-1, 0, 60).astype(np.float32)
        file["terminals"], file["timeouts"] = ends & (draws.uniform(size=60) < 0.5), ends


def stop_half_way(output: Path, expected: Path) -> None:
    """Take away what came after a run's middle, and keep what only its end has in another folder."""
    expected.mkdir(parents=True)
    last = output / "checkpoint-4"
    if last.is_dir():
        for name in ("agent.safetensors", "target.safetensors"):
            if (last / name).is_file():
                shutil.copy2(last / name, expected / name)
        shutil.rmtree(last)
    if (output / "rows.jsonl").is_file():
        shutil.copy2(output / "rows.jsonl", expected / "rows.jsonl")
        lines = (output / "rows.jsonl").read_text().splitlines(keepends=True)
        (output / "rows.jsonl").write_text("".join(lines[: len(lines) // 2]))
        for name in ("sft.parquet", "dpo.parquet", "summary.json"):
            (output / name).unlink(missing_ok=True)


def main() -> None:
    """Run every command and pack the files."""
    archive = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder)
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        for name, (module, *arguments) in COMMANDS.items():
            output = [] if name == "secant" else ["--output_dir", name]
            command = [sys.executable, "-m", module, *arguments, *output]
            subprocess.run(command, cwd=folder, env=environment, check=True)
        for name in COMMANDS:
            if name not in ("reward", "secant"):
                stop_half_way(folder / name, folder / "expected" / name)
        shutil.move(folder / "reward" / "checkpoint-2", folder / "reward_run" / "checkpoint-2")
        for path in [*folder.rglob("log.txt"), *folder.rglob("*.png"), *folder.glob("*/training_args.bin")]:
            path.unlink()
        shutil.rmtree(folder / "reward" / "checkpoint-4")  # other runs read "reward"; its own goes on in "reward_run"
        with tarfile.open(archive, "w:gz") as file:
            file.add(folder, arcname=".")
    print(f"{archive}: {archive.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
