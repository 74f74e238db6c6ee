"""Faults of the input are named before torch or transformers are imported; all cases share one fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from vgf_llm.engines.inputs import check_engine
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.models.inputs import check_base_model
from vgf_llm.settings import DECODER_OPTIONS, DecoderName

ROOT = Path(__file__).parents[1]
CHECK = """
import contextlib, importlib, io, json, sys
from vgf_llm.cli import run_main

found = []
for module, argv in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = run_main(importlib.import_module(module).main, argv)
    heavy = [name for name in ("torch", "transformers", "accelerate", "datasets", "deepspeed") if name in sys.modules]
    found.append([code, err.getvalue(), heavy])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small inputs: what looks like a model, an adapter and a reward model, pairs, prompts and logged responses."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, kind in (("base", "llama"), ("reward", "vgf_reward")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": kind, "max_position_embeddings": 2048}))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    (folder / "empty").mkdir()
    (folder / "a_file").write_text("")
    rows = {
        "pairs": {"question": "the sea", "chosen": "it is blue", "rejected": "it is bad"},
        "prompts": {"question": "the sea"},
        "good": {"prompt": "the sea"},
        "unseen": {"prompt": "the rain"},
        "logged": {"prompt": "the sea", "response": "it is blue", "score": 1.0},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "agent.csv").write_text("")
    (folder / "sum.yaml").write_text("sum: [{reward: length_words, weight: heavy}]")
    (folder / "judge.yaml").write_text("endpoint: {kind: classify, model: m, url_variable: NO_SUCH_URL}")
    return folder


def cases(folder: Path) -> list[tuple[str, list[str], str]]:
    """Return (module, arguments, start or part of the message)."""
    base, reward, good = f"{folder}/base", f"{folder}/reward", f"{folder}/good.jsonl"
    pairs, prompts, new = f"{folder}/pairs.jsonl", f"{folder}/prompts.jsonl", f"{folder}/new"
    unseen = f"{folder}/unseen.jsonl"

    def train_reward(*more: str) -> list[str]:
        return ["--model_name_or_path", base, "--train_dataset", pairs, "--output_dir", new, *more]

    def transports(*more: str) -> list[str]:
        return ["--model_name_or_path", base, "--reward_model", reward, *more]

    def fine_tune(*more: str) -> list[str]:
        required = ["--prompts", good, "--rewards", "length_words", "--output_dir", new, "--value", "learned"]
        return ["--model_name_or_path", base, *required, *more]

    def direction(*more: str) -> list[str]:
        required = ["--kind", "causal", "--reward", reward, "--prompts", good, "--validation_prompts", unseen]
        return ["--model_name_or_path", base, *required, *more]

    return [
        ("reward_models.train", train_reward("--chosen_column", "better"), "no column 'better'; columns: question, ch"),
        ("reward_models.train", train_reward("--objectives", "{a: b-c}"), "no row has the column 'b-c' that --obj"),
        ("reward_models.train", train_reward("--train_dataset", f"{folder}/none.jsonl"), "none.jsonl' does not exist"),
        ("reward_models.train", train_reward("--report_to", "clearml"), "report_to: 'clearml' needs its package"),
        ("reward_models.train", train_reward("--report_to", "wandbb"), "report_to: 'wandbb' is unknown"),
        ("reward_models.train", train_reward("--trainer_arguments", "{optim: adam}"), "optim: 'adam' is unknown"),
        ("reward_models.train", train_reward("--trainer_arguments", "{lr: 1}"), "TrainingArguments has no 'lr'"),
        ("reward_models.train", train_reward("--max_length", "100000"), "positions; set max_length to at most"),
        ("reward_models.train", train_reward("--model_name_or_path", "./none"), "there is no such folder"),
        ("reward_models.train", train_reward("--model_name_or_path", f"{folder}/empty"), "has no config.json"),
        ("reward_models.train", train_reward("--output_dir", f"{folder}/a_file"), "is a file; name another folder"),
        ("reward_models.train", train_reward("--output_dir", base), "holds a model of type 'llama'"),
        ("reward_models.train", train_reward("--resume", "none"), "'none' is not a folder"),
        ("reward_models.train_value", train_reward("--train_dataset", f"{folder}/logged.jsonl"), "no reward in column"),
        (
            "reward_models.train_value",
            train_reward("--train_dataset", f"{folder}/logged.jsonl", "--reward_function", "lenght"),
            "reward function 'lenght' does not exist",
        ),
        (
            "reward_models.train_secant",
            ["--reward_model", f"{folder}/none", "--prompts", good, "--validation_prompts", good],
            "none' is not a folder",
        ),
        (
            "reward_models.train_secant",
            [
                "--reward_model",
                reward,
                "--model_name_or_path",
                base,
                "--prompts",
                prompts,
                "--validation_prompts",
                good,
            ],
            "no column 'prompt'; columns: question",
        ),
        ("reward_models.train_direction", direction("--reward", "lenght"), "reward function 'lenght' does not exist"),
        ("reward_models.train_direction", direction("--reward", "brevity"), "which has no folder; set output_dir"),
        ("reward_models.train_direction", direction("--prompts", prompts), "no column 'prompt'; columns: question"),
        ("reward_models.train_direction", direction("--guided", good), "no text in column 'response', got None"),
        ("reward_models.train_direction", direction("--gold", f"{folder}/empty"), "has no config.json"),
        ("vgf_llm.train", fine_tune("--rewards", "mine:good"), "module 'mine' cannot be imported"),
        ("vgf_llm.train", fine_tune("--rewards", "outputs/none"), "rewards: 'outputs/none' is not a folder"),
        (
            "vgf_llm.train",
            fine_tune("--rewards", f"{folder}/sum.yaml"),
            "sum.yaml: key 'sum[0].weight': expected a finite",
        ),
        ("vgf_llm.train", fine_tune("--gold", f"{folder}/judge.yaml"), "environment variable NO_SUCH_URL is not set"),
        ("vgf_llm.train", fine_tune("--reward_cache", f"{folder}/a_file/x"), "a_file/x' cannot be used"),
        (
            "vgf_llm.evaluate",
            transports("--prompts", good, "--gold", f"{folder}/none.yaml"),
            "none.yaml' does not exist",
        ),
        ("vgf_llm.train", fine_tune("--gold", "vader"), "reward function 'vader' does not exist"),
        ("vgf_llm.train", fine_tune("--prompts", prompts), "no column 'prompt'; columns: question"),
        ("vgf_llm.train", fine_tune("--decoder_options", "{top: 1}"), "'prior' has no option 'top'; it has multiplier"),
        ("vgf_llm.train", fine_tune("--lr_scheduler_type", "linera"), "lr_scheduler_type: 'linera' is unknown"),
        ("vgf_llm.train", fine_tune("--model_name_or_path", f"{folder}/adapter"), "is an adapter"),
        ("vgf_llm.train", fine_tune("--output_dir", f"{folder}/a_file"), "is a file; name another folder"),
        ("vgf_llm.generate", ["--prompt", "the sea"], "reward_model is not set"),
        ("vgf_llm.generate", transports("--prompts", prompts), "no column 'prompt'; columns: question"),
        ("vgf_llm.generate", transports("--prompt", "x", "--decoder_options", "{a: 1}"), "'prior' has no option 'a'"),
        ("vgf_llm.generate", transports("--prompt", "x", "--output", good), "good.jsonl exists"),
        ("vgf_llm.generate", transports("--prompt", "x", "--reward_model", f"{folder}/none"), "none' is not a folder"),
        ("vgf_llm.transport", transports("--prompts", prompts, "--output_dir", new), "no column 'prompt'"),
        (
            "vgf_llm.transport",
            transports("--prompts", good, "--reward_model", "none", "--output_dir", new),
            "not a fold",
        ),
        ("vgf_llm.evaluate", transports("--prompts", prompts, "--output_dir", new), "no column 'prompt'"),
        ("vgf_llm.evaluate", transports("--prompts", good, "--gold", "vader", "--output_dir", new), "'vader' does not"),
        ("vgf_llm.evaluate", transports("--prompts", good, "--output_dir", f"{folder}/a_file"), "is a file"),
        ("vgf_llm.serve", ["--reward_model", f"{folder}/none", "--port", "0"], "none' is not a folder"),
        ("vgf_llm.demo", ["--recipe", f"{folder}/none", "--output_dir", new], "has no demo.yaml"),
        ("vgf_llm.verify_resume", ["--checkpoint", f"{folder}/none"], "none"),
        ("vgf_llm.control.train", ["--data", f"{folder}/none.npz", "--output_dir", new], "none.npz' does not exist"),
        (
            "vgf_llm.control.train",
            ["--data", f"{folder}/agent.csv", "--output_dir", new],
            "is not a .npz or .hdf5 file",
        ),
        ("vgf_llm.control.report", [], "runs: give at least one folder"),
    ]


def test_every_fault_is_named_before_the_model_stack(folder):
    asked = cases(folder)
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        input=json.dumps([[module, argv] for module, argv, _ in asked]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    wrong = []
    for (module, argv, message), (code, err, heavy) in zip(asked, json.loads(done.stdout), strict=True):
        if code != 2 or message not in err.splitlines()[-1] or heavy:
            wrong.append(f"{module} {' '.join(argv)}\n{heavy}\n{err}")
    assert wrong == [], "\n".join(wrong)


def test_the_known_options_are_those_of_the_decoders():
    from inspect import Parameter, signature

    from vgf_llm.text import decoders

    for name in set(get_args(DecoderName)) - {"stream"}:  # tests/answering/test_one_pass.py
        maker = getattr(decoders, "".join(part.title() for part in name.split("_")) + "Decoder")
        options = [key for key, one in signature(maker).parameters.items() if one.kind is Parameter.KEYWORD_ONLY]
        assert DECODER_OPTIONS[name] == tuple(options)


def test_a_name_of_the_hub_is_taken_as_it_is(folder, monkeypatch):
    check_base_model("owner/name")
    check_base_model("gpt2")
    check_base_model(str(folder / "adapter"))
    with pytest.raises(ModelError, match="is a file"):
        check_base_model(str(folder / "a_file"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("VGF_LLM_CACHE", str(folder / "no_cache"))
    with pytest.raises(ModelError, match="embedded model's weights are not installed"):
        check_base_model("default")
    with pytest.raises(ConfigError, match="backend: vllm is not installed"):
        check_engine("vllm", None)
    check_engine("vllm", "http://127.0.0.1:8000")
