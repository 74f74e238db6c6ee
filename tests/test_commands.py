"""generate and evaluate as their users run them, on tiny saved models: outputs, resume, and what bad input is told."""

import io
import json

import pytest
import torch

from reward_models.modelling import RewardModel
from vgf_llm import evaluate, generate
from vgf_llm.errors import ConfigError, DataError, ModelError, NonFiniteError, OutputError
from vgf_llm.runs.files import read_jsonl


@pytest.fixture
def models(tmp_path, tiny_lm, tiny_tokenizer):
    """Flags that name a tiny base model and a reward model cut from it."""
    base, reward = tmp_path / "base", tmp_path / "reward"
    tiny_lm.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    RewardModel.from_base(tiny_lm, num_layers=1).save_pretrained(reward)
    return [
        "--model_name_or_path", str(base), "--reward_model", str(reward), "--max_new_tokens", "6", "--top_k", "10",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"write about the {w}"}) + "\n" for w in ("sea", "dog", "tree")))
    return path


def lines(captured):
    return [json.loads(line) for line in captured.out.splitlines()]


def test_generate_prints_one_json_object_a_prompt(models, capsys):
    argv = [*models, "--prompt", "the sea", "--prompt", "a dog", "--num_particles", "4", "--budget.nats", "1"]
    assert generate.main(argv) == 0
    rows = lines(capsys.readouterr())
    assert [row["prompt"] for row in rows] == ["the sea", "a dog"]
    for row in rows:
        assert row["value"] >= row["original_value"]
        assert set(row["distance"]) == {"nats", "changed_tokens", "displacement"}


def test_generate_with_no_steps_is_best_of_n(models, capsys):
    generate.main([*models, "--prompt", "the sea", "--budget.steps", "0"])
    (row,) = lines(capsys.readouterr())
    assert row["response"] == row["original"] and row["value"] == row["original_value"]
    assert (
        row["rounds"] == 0
        and row["source"] == row["original"]
        and row["distance"] == {"nats": 0.0, "changed_tokens": 0, "displacement": 0.0}
    )


def test_an_answer_does_not_depend_on_the_batch(models, prompts, capsys):
    argv = [*models, "--prompts", str(prompts), "--num_particles", "3"]
    generate.main([*argv, "--batch_prompts", "1"])
    one_by_one = lines(capsys.readouterr())
    generate.main([*argv, "--batch_prompts", "3"])
    together = lines(capsys.readouterr())
    assert [row["response"] for row in one_by_one] == [row["response"] for row in together]


def test_generate_reads_standard_input_and_writes_a_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\n\na dog\n"))
    output = tmp_path / "out" / "answers.jsonl"
    generate.main([*models, "--output", str(output)])
    assert len(list(read_jsonl(output))) == 2
    with pytest.raises(OutputError, match="exists"):
        generate.main([*models, "--prompt", "x", "--output", str(output)])


def test_standard_input_is_utf8_whatever_the_locale(models, tmp_path, monkeypatch):
    for text, found in (("caf\u00e9\n", "caf\u00e9"), ("\ufeffthe sea\n", "the sea")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
        assert generate._prompts(generate.GenerateSettings()) == [found]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\ncaf\xe9\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="standard input, line 2: not UTF-8 text"):
        generate.main([*models, "--output", str(tmp_path / "answers.jsonl")])


def arguments(models, prompts, tmp_path, *more):
    return [
        *models, "--prompts", str(prompts), "--output_dir", str(tmp_path / "run"), "--gold", "length_words",
        "--num_particles", "4", "--best_of", "[4, 8]", "--budgets", "[{nats: 0.5}, {nats: 2.0}]", *more,
    ]  # fmt: skip


def test_evaluate_writes_rows_summary_and_a_last_line_of_json(models, prompts, tmp_path, capsys):
    assert evaluate.main(arguments(models, prompts, tmp_path)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == ["base", "best-of-4", "best-of-8", "0.5 nats", "2 nats"]
    rows = list(read_jsonl(tmp_path / "run" / "rows.jsonl"))
    assert len(rows) == 5 * 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["arms"]["2 nats"]["nats"]["mean"] > summary["arms"]["0.5 nats"]["nats"]["mean"] > 0
    assert (
        summary["arms"]["best-of-8"]["selected_proxy"]["mean"] >= summary["arms"]["best-of-4"]["selected_proxy"]["mean"]
    )
    by_arm = {row["arm"]: row for row in rows if row["prompt_index"] == 0}
    assert by_arm["best-of-8"]["texts"][:4] == by_arm["best-of-4"]["texts"]


def test_evaluate_stopped_by_ctrl_c_goes_on_where_it_was(models, prompts, tmp_path, monkeypatch):
    argv = arguments(models, prompts, tmp_path, "--batch_prompts", "1")
    whole_dir = tmp_path / "whole"
    evaluate.main([*argv, "--output_dir", str(whole_dir)])
    real, calls = evaluate.append_jsonl, []

    def interrupted(path, rows):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(rows)
        real(path, rows)

    monkeypatch.setattr(evaluate, "append_jsonl", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(argv)
    monkeypatch.setattr(evaluate, "append_jsonl", real)
    rows_path = tmp_path / "run" / "rows.jsonl"
    assert len(list(read_jsonl(rows_path))) == 7
    with pytest.raises(OutputError, match="--resume"):
        evaluate.main(argv)
    evaluate.main([*argv, "--resume", "true"])

    def texts(path):
        return {(r["arm"], r["seed"], r["prompt_index"]): (r["texts"], r["selected"]) for r in read_jsonl(path)}

    assert texts(rows_path) == texts(whole_dir / "rows.jsonl")


def test_evaluate_refuses_to_mix_two_configurations(models, prompts, tmp_path):
    evaluate.main(arguments(models, prompts, tmp_path))
    with pytest.raises(ConfigError, match="other settings .temperature"):
        evaluate.main(arguments(models, prompts, tmp_path, "--resume", "true", "--temperature", "0.5"))


def test_resume_refuses_a_reward_model_or_prompts_that_changed(models, prompts, tmp_path):
    evaluate.main(arguments(models, prompts, tmp_path))
    prompts.write_text(prompts.read_text().replace("sea", "tea"))
    with pytest.raises(ConfigError, match="other settings .contents"):
        evaluate.main(arguments(models, prompts, tmp_path, "--resume", "true"))


def test_a_gold_function_that_misbehaves_is_named(models, prompts, tmp_path, monkeypatch):
    def broken(prompts, responses):
        return [float("nan")] * len(responses)

    broken.__module__ = "reward_models.functions"
    monkeypatch.setattr("reward_models.functions.length_words", broken)
    with pytest.raises(ModelError, match="finite"):
        evaluate.main(arguments(models, prompts, tmp_path))


def test_bfloat16_runs(models, capsys):
    assert generate.main([*models, "--dtype", "bfloat16", "--prompt", "the sea"]) == 0
    assert len(lines(capsys.readouterr())) == 1


def test_summary_is_strict_json(models, prompts, tmp_path):
    arms = "[{name: base}, {name: nearest, decoder: nearest, budget: {step: normalised}}]"
    evaluate.main([*models, "--prompts", str(prompts), "--arms", arms, "--output_dir", str(tmp_path / "run")])
    text = (tmp_path / "run" / "summary.json").read_text()
    assert "NaN" not in text and json.loads(text)["arms"]["nearest"]["nats"] is None


def test_resume_may_add_prompts_and_arms(models, prompts, tmp_path):
    evaluate.main(arguments(models, prompts, tmp_path, "--num_prompts", "1"))
    evaluate.main(arguments(models, prompts, tmp_path, "--resume", "true"))
    rows = list(read_jsonl(tmp_path / "run" / "rows.jsonl"))
    assert len(rows) == len({(r["arm"], r["seed"], r["prompt_index"]) for r in rows}) == 15


def test_bad_input_is_told_what_to_do(models, prompts, tmp_path, tiny_tokenizer):
    base = models[1]
    with pytest.raises(ConfigError, match="reward_model is not set"):
        generate.main(["--model_name_or_path", base, "--prompt", "x"])
    with pytest.raises(ModelError, match="is not a folder"):
        generate.main([*models, "--reward_model", str(tmp_path / "absent"), "--prompt", "x"])
    with pytest.raises(ConfigError, match="torch sees"):
        generate.main([*models, "--device", "cuda:99", "--prompt", "x"])
    with pytest.raises(ConfigError, match="num_prompts must be null or at least 1, got 0"):
        generate.main([*models, "--prompt", "x", "--num_prompts", "0"])
    with pytest.raises(ConfigError, match="give one of them"):
        generate.main([*models, "--prompt", "x", "--prompts", str(prompts)])
    with pytest.raises(ConfigError, match="num_particles must be at least 1, got 0"):
        generate.main([*models, "--prompt", "x", "--num_particles", "0"])
    with pytest.raises(ConfigError, match="nats"):
        generate.main([*models, "--prompt", "x", "--budget.natz", "1"])
    with pytest.raises(DataError, match="prompt 0"):
        generate.main([*models, "--prompt", "sea " * 200])
    with pytest.raises(DataError, match="no column 'text'"):
        evaluate.main(arguments(models, prompts, tmp_path, "--prompt_column", "text"))
    with pytest.raises(ConfigError, match="unique names"):
        arms = "[{name: a}, {name: a}]"
        evaluate.main([*models, "--prompts", str(prompts), "--arms", arms, "--output_dir", str(tmp_path / "x")])


def test_an_unwritable_output_folder_is_found_before_any_model_is_loaded(models, prompts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("vgf_llm.models.loading.load_causal_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(OutputError):
        evaluate.main(arguments(models, prompts, tmp_path, "--output_dir", str(tmp_path / "file" / "run")))


def test_tokenizers_that_cannot_stop_are_refused_and_any_token_pads(models, tmp_path, tiny_tokenizer, capsys):
    """Masks tell padding, so a tokenizer that pads with its EOS, or names no padding token (GPT-2), answers alike."""
    base, answers = models[1], []
    for pad in ("<pad>", None, tiny_tokenizer.eos_token):
        tiny_tokenizer.pad_token = pad
        for folder in (base, models[3]):
            tiny_tokenizer.save_pretrained(folder)
        generate.main([*models, "--prompt", "the sea", "--prompt", "a red house is on the sea"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] and "response" in answers[0]
    tiny_tokenizer.eos_token = None
    tiny_tokenizer.save_pretrained(base)
    with pytest.raises(ModelError, match="no EOS token"):
        generate.main([*models, "--prompt", "the sea"])
    with pytest.raises(ModelError, match="not in the vocabulary"):
        generate.main([*models, "--prompt", "the sea", "--pad_token", "<nothing>"])


def test_a_value_that_is_not_finite_stops_with_the_prompt(models, prompts, tmp_path):
    reward = RewardModel.from_pretrained(models[3])
    with torch.no_grad():
        reward.head.weight.fill_(float("nan"))
    reward.save_pretrained(models[3])
    with pytest.raises(NonFiniteError, match="prompt 0"):
        generate.main([*models, "--prompts", str(prompts)])
    with pytest.raises(NonFiniteError, match="prompt 0"):
        generate.main([*models, "--prompts", str(prompts), "--budget.steps", "0"])
    with pytest.raises(NonFiniteError, match="prompt 0 .*sea"):
        evaluate.main(arguments(models, prompts, tmp_path))
