"""The comparison of trainers on a tiny model: every trainer takes steps, one evaluation for all, and a run goes on."""

import importlib
import json
from types import SimpleNamespace

import pytest

from benchmarks import training, training_evaluate, training_report, training_trl
from benchmarks.training_job import Job, identity
from benchmarks.training_marks import TimeMarks, peak_resident_gib
from reward_models.modelling import RewardModel
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.settings import ModelSettings, SamplingSettings

SAMPLING = SamplingSettings(top_k=10, max_new_tokens=6)


@pytest.fixture
def models(tmp_path, tiny_lm, tiny_tokenizer):
    base, reward = tmp_path / "base", tmp_path / "reward"
    tiny_lm.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean").save_pretrained(reward)
    return ModelSettings(model_name_or_path=str(base), reward_model=str(reward), device="cpu")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"write about the {w}"}) + "\n" for w in ("sea", "dog", "tree")))
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "vgf.yaml"
    path.write_text("budget: {nats: 1.0}\nlogging_steps: 1\n")
    return str(path)


def job(method, tmp_path, prompts, **changes):
    settings = {"minutes": 1e-4, "max_steps": 1, "prompts_per_step": 3, "num_generations": 4, "marks": 2}
    return Job(method, str(tmp_path / method), 1e-2, prompts=prompts, **(settings | changes))


@pytest.mark.parametrize("method", ["grpo", "rloo", "dpo"])
def test_trl_takes_steps_and_leaves_adapters(method, models, prompts, tmp_path):
    result = training_trl.run(job(method, tmp_path, prompts), models, SAMPLING)
    assert [mark["mark"] for mark in result["marks"]] == [1, 2]
    assert result["steps"] == 1 and result["seconds_a_step"] > 0 and result["peak_memory_gib"] > 0.05
    assert json.loads((tmp_path / method / "result.json").read_text()) == result
    assert all((tmp_path / method / f"mark_{n}" / "adapter_model.safetensors").is_file() for n in (1, 2))
    if method == "dpo":
        assert result["pairs"] > 0 and result["seconds_before_training"] > 0


def test_a_step_is_split_into_equal_forwards():
    assert training_trl._batch(32, 8) == {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    assert training_trl._batch(12, 8) == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    assert training_trl._batch(3, 4) == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}


def test_our_trainer_takes_steps_under_the_same_clock(models, prompts, recipe, tmp_path):
    from benchmarks import training_vgf

    result = training_vgf.run(job("vgf", tmp_path, prompts, recipe=recipe), models, SAMPLING)
    assert [mark["mark"] for mark in result["marks"]] == [1, 2] and result["steps"] == 1
    assert (tmp_path / "vgf" / "mark_2" / "adapter_model.safetensors").is_file()


def test_rewards_are_those_of_the_sampled_tokens(models, prompts):
    from vgf_llm.answering.pipeline import encode_prompts, load_pipeline
    from vgf_llm.text import row_seeds
    from vgf_llm.text.sampler import ReferenceSampler

    pipeline = load_pipeline(models, SAMPLING)
    texts = ["write about the sea", "a dog"]
    ids = encode_prompts(pipeline, texts)
    responses = ReferenceSampler(pipeline.reference).sample(ids, row_seeds(0, [0, 1], 3))
    expected = pipeline.value.score(pipeline.value.prefix(ids), responses.tokens_BNT, responses.mask_BNT).flatten()
    rows = [row[keep].tolist() for row, keep in training_trl._rows(responses)]
    chats = [[{"role": "user", "content": text}] for text in texts for _ in range(3)]
    got = training_trl.reward_function(pipeline)(prompts=chats, completion_ids=rows, completions=None)
    assert got == pytest.approx(expected.tolist(), abs=1e-5)


def test_marks_follow_the_clock_and_saving_costs_no_time(tmp_path):
    """Marks are due at 15, 30, 45 and 60 seconds. 10 were spent before; a step takes 12 seconds and saving 100.

    Steps end at 22, 34, 46, 58 and 70: the marks fall on the first, second, third and fifth.
    """
    now = [0.0]

    def save(folder):
        now[0] += 100

    model = SimpleNamespace(save_pretrained=save)
    marks = TimeMarks(tmp_path, minutes=1.0, marks=4, spent_sec=10.0, clock=lambda: now[0])
    control = SimpleNamespace(should_training_stop=False)
    marks.on_train_begin(None, None, control)
    for step in range(1, 6):
        assert not control.should_training_stop
        now[0] += 12
        marks.on_step_end(None, SimpleNamespace(global_step=step), control, model=model)
    assert control.should_training_stop
    assert [(mark["steps"], mark["minutes"]) for mark in marks.saved] == [
        (1, 0.3667), (2, 0.5667), (3, 0.7667), (5, 1.1667)
    ]  # fmt: skip
    assert marks.training_sec == 60


def test_one_long_step_passes_several_marks_at_once(tmp_path):
    saved, now = [], [0.0]
    model = SimpleNamespace(policy=SimpleNamespace(save_pretrained=saved.append))
    marks = TimeMarks(tmp_path, minutes=1.0, marks=4, clock=lambda: now[0])
    control = SimpleNamespace(should_training_stop=False)
    marks.on_train_begin(None, None, control)
    now[0] = 40.0
    marks.on_step_end(None, SimpleNamespace(global_step=1), control, model=model)
    assert [path.rpartition("/")[2] for path in saved] == ["mark_1", "mark_2"]
    marks.on_train_end(None, None, control, model=model)
    assert len(saved) == 4


def evaluation(models, prompts, tmp_path, *adapters):
    settings = training_evaluate.EvaluationSettings(
        adapter=list(adapters), prompts=prompts, output_dir=str(tmp_path / "base_figures"), num_samples=2,
        gold="length_words",
    )  # fmt: skip
    return training_evaluate.run(settings, models, SAMPLING)


def test_the_base_is_at_distance_zero_and_an_adapter_is_not(models, prompts, tmp_path):
    training_trl.run(job("grpo", tmp_path, prompts, max_steps=3, minutes=1.0), models, SAMPLING)
    adapter = str(tmp_path / "grpo" / "mark_2")
    alone = evaluation(models, prompts, tmp_path, "base")["base"]
    assert all(row["kl"] == 0 for row in alone["prompts"])
    both = evaluation(models, prompts, tmp_path, adapter, "base")
    assert both["base"] == alone
    assert any(row["kl"] != 0 for row in both[adapter]["prompts"])
    fresh = evaluation(models, prompts, tmp_path / "other", adapter, "base")  # the base after an adapter was on it
    assert fresh["base"]["prompts"] == alone["prompts"]
    with pytest.raises(ModelError, match="holds no adapter"):
        evaluation(models, prompts, tmp_path, str(tmp_path))


def test_figures_are_measured_again_when_the_adapter_changed(models, prompts, tmp_path):
    adapter = str(tmp_path / "grpo" / "mark_2")
    training_trl.run(job("grpo", tmp_path, prompts), models, SAMPLING)
    first = evaluation(models, prompts, tmp_path, adapter)[adapter]
    training_trl.run(job("grpo", tmp_path, prompts, seed=1), models, SAMPLING)
    assert evaluation(models, prompts, tmp_path, adapter)[adapter]["settings"] != first["settings"]


@pytest.fixture
def flags(models, prompts, recipe, tmp_path, monkeypatch):
    """The command's flags, with children run in this process and counted."""
    ran = []

    def child(module, flags, folder):
        ran.append(module)
        if module == "benchmarks.training_vgf":  # GRPO stands in for our trainer, which has a test of its own
            module, flags = "benchmarks.training_trl", [flag if flag != "vgf" else "grpo" for flag in flags]
        importlib.import_module(module).main(flags)
        if ran[-1] == "benchmarks.training_vgf":
            path = folder / "result.json"
            path.write_text(path.read_text().replace('"method": "grpo"', '"method": "vgf"'))

    monkeypatch.setattr(training, "_run_child", child)
    monkeypatch.setattr(training_report, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(training_report, "FIGURES", tmp_path / "figures")
    given = {
        "model_name_or_path": models.model_name_or_path, "reward_model": models.reward_model, "device": "cpu",
        "max_new_tokens": 6, "top_k": 10, "train_prompts": prompts, "validation_prompts": prompts,
        "test_prompts": prompts, "recipe": recipe, "gold": "length_words", "num_samples": 2, "max_steps": 1,
        "methods": ["vgf", "grpo", "dpo"], "minutes": 0.001, "tune_minutes": 0.001,
        "learning_rates": {"vgf": [1e-3, 1e-2], "grpo": [1e-3, 1e-2], "dpo": [1e-3, 1e-2]},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    return training.as_flags(given), ran


def test_tune_compare_and_report(flags, tmp_path, capsys):
    argv, ran = flags
    assert training.main([*argv, "--stage", "tune"]) == 0
    rates = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(rates) == {"vgf", "grpo", "dpo"} and set(rates.values()) <= {1e-3, 1e-2}
    assert ran.count("benchmarks.training_vgf") == 2 and ran.count("benchmarks.training_trl") == 4

    assert training.main([*argv, "--record", "tiny"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {"gold_at_equal_time", "peak_memory_gib"}
    assert set(last["gold_at_equal_time"]) == {"vgf", "grpo", "dpo"}
    summary = json.loads((tmp_path / "records" / "tiny.json").read_text())
    assert {name: entry["learning_rate"] for name, entry in summary["methods"].items()} == rates
    assert len(summary["methods"]["grpo"]["marks"]) == 4 and set(summary["vgf_minus"]) == {"grpo", "dpo"}
    text = (tmp_path / "records" / "tiny.md").read_text()
    assert "GRPO (TRL)" in text and "Learning rates tried" in text
    assert (tmp_path / "figures" / "tiny.png").read_bytes().startswith(b"\x89PNG")

    trained = [module for module in ran if module != "benchmarks.training_evaluate"]
    assert training.main([*argv, "--stage", "report"]) == 0 and training.main(argv) == 0
    assert [module for module in ran if module != "benchmarks.training_evaluate"] == trained
    with pytest.raises(ConfigError, match="another minutes"):
        training.main([*argv, "--minutes", "0.002"])


def test_every_method_gets_as_many_tries(flags):
    argv, _ = flags
    with pytest.raises(ConfigError, match="as many tries"):
        training.main([*argv, "--learning_rates", '{"vgf": [1.0], "grpo": [1.0, 2.0], "dpo": [1.0]}'])
    with pytest.raises(ConfigError, match="no finished run"):
        training.main([*argv, "--stage", "report"])


def test_a_failing_child_is_named_with_its_log(tmp_path):
    with pytest.raises(ModelError, match=r"training_trl ended with exit code 2 .*log.txt"):
        training._run_child("benchmarks.training_trl", ["--method", "ppo"], tmp_path)


def test_paired_differences_go_by_prompt():
    one = [{"index": 0, "gold": 1.0}, {"index": 1, "gold": 2.0}]
    other = [{"index": 1, "gold": 1.5}, {"index": 0, "gold": 0.5}]
    assert training_report._difference(one, other) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_a_job_is_known_by_what_decides_its_result(models, prompts, tmp_path):
    one = job("grpo", tmp_path, prompts)
    assert "output_dir" not in identity(one, models, SAMPLING)
    assert identity(one, models, SAMPLING)["learning_rate"] == 1e-2
    assert 0.05 < peak_resident_gib() < 100
    with pytest.raises(ConfigError, match="not TRL's"):
        training_trl.run(job("vgf", tmp_path, prompts), models, SAMPLING)
