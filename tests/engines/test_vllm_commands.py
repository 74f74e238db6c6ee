"""evaluate and generate through vLLM, as their users run them, against the same commands with transformers."""

import json
import os
import subprocess
import sys

import pytest

from tests.engines.conftest import quiet_vllm
from vgf_llm import evaluate, generate
from vgf_llm.errors import ConfigError
from vgf_llm.runs.files import read_jsonl

ENGINE = ["--backend", "vllm", "--engine.kv_cache_gib", "0.05", "--engine.eager", "true"]
SAME = ("proxy", "gold", "nats", "changed", "tokens", "selected", "texts", "tflops", "selected_index")


@pytest.fixture
def flags(tiny_folder, tmp_path):
    """Flags that name the tiny base model and a reward model cut from it."""
    from reward_models.modelling import RewardModel
    from tests.conftest import build_llama
    from tests.engines.conftest import WIDTH

    RewardModel.from_base(build_llama(width=WIDTH), num_layers=1).save_pretrained(tmp_path / "reward")
    return [
        "--model_name_or_path", str(tiny_folder), "--reward_model", str(tmp_path / "reward"), "--max_new_tokens", "6",
        "--top_k", "10", "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.slow
def test_evaluate_gives_the_same_rows_through_vllm(flags, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    quiet_vllm(os.environ)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"write about the {w}"}) + "\n" for w in ("sea", "dog", "tree")))
    argv = [
        *flags, "--prompts", str(prompts), "--gold", "length_words", "--num_particles", "4", "--best_of", "[4, 8]",
        "--budgets", "[{nats: 0.5}, {nats: 2.0, rounds: 2}]",
    ]  # fmt: skip
    evaluate.main([*argv, "--output_dir", str(tmp_path / "here")])
    evaluate.main([*argv, "--output_dir", str(tmp_path / "there"), *ENGINE])
    here, there = (list(read_jsonl(tmp_path / name / "rows.jsonl")) for name in ("here", "there"))
    assert len(here) == len(there) == 5 * 3
    for one, other in zip(here, there, strict=True):
        for key in SAME:
            assert one[key] == (pytest.approx(other[key], abs=1e-3) if key in ("proxy", "nats") else other[key]), key
        assert one["nll"] == pytest.approx(other["nll"], abs=1e-3)


@pytest.mark.slow
def test_generate_gives_the_same_answers_through_vllm(flags, capfd):  # vLLM asks for a real file
    pytest.importorskip("vllm")
    quiet_vllm(os.environ)
    rows = []
    for backend in ([], ENGINE):
        generate.main([*flags, "--prompt", "the sea", "--num_particles", "4", "--decoder", "pivot", *backend])
        rows.append(json.loads(capfd.readouterr().out.splitlines()[-1]))
    assert rows[0]["response"] == rows[1]["response"] and rows[0]["original"] == rows[1]["original"]


@pytest.mark.slow
def test_devices_share_a_model_and_answers_alone_stand_on_standard_output(flags):
    """As processes of their own, with vLLM as talkative as it comes."""
    pytest.importorskip("vllm")
    quiet = {"VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM", "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    command = [sys.executable, "-m", "vgf_llm.cli", "generate", *flags, "--prompt", "the sea", "--num_particles", "4"]
    printed = [
        subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, check=True, timeout=300
        ).stdout
        for more in ([], [*ENGINE, "--engine.tensor_parallel", "2"])
    ]
    here, there = (json.loads(one) for one in printed)
    assert here["response"] == there["response"] and here["original"] == there["original"]


def test_what_the_engine_cannot_do_is_said_before_it_starts(flags):
    with pytest.raises(ConfigError, match="top_k must be at least 1 with backend vllm, got 0"):
        generate.main([*flags, "--prompt", "the sea", "--backend", "vllm", "--top_k", "0"])


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("memory_share", "0", "memory_share must be in"),
        ("kv_cache_gib", "-1", "kv_cache_gib must be null or above 0"),
        ("tensor_parallel", "0", "tensor_parallel must be at least 1"),
        ("timeout_sec", "0", "timeout_sec must be above 0"),
        ("url", "localhost:8000", "url must be null or start with http"),
    ],
)
def test_an_engine_setting_out_of_range_is_refused(flags, flag, value, message):
    with pytest.raises(ConfigError, match=message):
        generate.main([*flags, "--prompt", "the sea", f"--engine.{flag}", value])


def test_a_server_that_is_not_there_is_named(flags):
    from vgf_llm.engines.engine import EngineError

    with pytest.raises(EngineError, match=r"vLLM server at http://127.0.0.1:9 cannot be reached"):
        generate.main([*flags, "--prompt", "the sea", "--backend", "vllm", "--engine.url", "http://127.0.0.1:9"])
