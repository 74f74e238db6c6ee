"""Value training end to end on tiny models: it learns what prefixes are worth, resumes, and names what is wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reward_models.card import read_card
from reward_models.loading import load_reward_model
from reward_models.logged import EncodedResponse, LoggedCollator, encode_logged, load_logged, response_pairs
from reward_models.pooling import prefix_columns
from reward_models.train_value import main
from reward_models.value_model import build_value_model
from reward_models.value_settings import ValueTraining
from reward_models.value_trainer import TARGET_NAME, ValueTrainer
from vgf_llm.cli import run_main
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.runs.hf_arguments import training_arguments

ROOT = Path(__file__).parents[2]
FILLER = ["the", "a", "dog", "sea", "is"]


def toy_rows(count, seed=0):
    """Four words; the reward is 1 with "good" among them and -1 with "bad"."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [rng.choice(FILLER) for _ in range(3)]
        good = rng.random() < 0.5
        words.insert(rng.randrange(4), "good" if good else "bad")
        topic = rng.choice(["dog", "cat", "rain", "coffee", "tea"])
        rows.append({"prompt": f"write about {topic}", "response": " ".join(words), "reward": 1.0 if good else -1.0})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def workplace(tmp_path, tiny_lm, tiny_tokenizer):
    """A folder with a base model and logged responses; returns a function that writes flags for `main`."""
    tiny_lm.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "train.jsonl", toy_rows(200))
    write(tmp_path / "held_out.jsonl", toy_rows(40, seed=1))

    def flags(**changes):
        values = {
            "train_dataset": tmp_path / "train.jsonl",
            "eval_dataset": tmp_path / "held_out.jsonl",
            "output_dir": tmp_path / "out",
            "model_name_or_path": tmp_path / "base",
            "num_layers": 1,
            "pooling": "mean",
            "input_skip": "true",
            "max_length": 64,
            "learning_rate": 1e-2,
            "head_learning_rate": 3e-2,
            "per_device_train_batch_size": 16,
            "max_steps": 60,
            "target_tau": 0.2,
            "fidelity_responses": 4,
            "fidelity_substitutions": 20,
        } | changes
        return [token for key, value in values.items() for token in (f"--{key}", str(value))]

    return flags


@pytest.mark.parametrize("lora_r", [0, 4])
def test_it_learns_what_a_prefix_is_worth_and_the_folder_loads_like_a_reward_models(
    workplace, tmp_path, tiny_tokenizer, capsys, lora_r
):
    assert main(workplace(lora_r=lora_r)) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["explained_variance"] > 0.8 and figures["value_error"] < 0.45 and figures["accuracy"] >= 0.9
    card = read_card(tmp_path / "out")
    assert card.train_responses == 200 and card.held_out_responses == 40 and card.held_out_pairs > 0
    assert card.explained_variance == figures["explained_variance"] and card.adapter == bool(lora_r)
    assert card.fidelity["n"] == 4 and card.training["lambda"] == 0.95
    assert "# Value model" in (tmp_path / "out" / "README.md").read_text()
    model = load_reward_model(tmp_path / "out", tokenizer=tiny_tokenizer)
    rows = [{"prompt": "write about dog", "response": f"the {word} sea is", "reward": 0} for word in ("good", "bad")]
    encoded, _ = encode_logged(tiny_tokenizer, load_logged(write(tmp_path / "two.jsonl", rows)), 64)
    batch = LoggedCollator(0)(encoded)
    batch.pop("reward")
    values, _ = prefix_columns(model(**batch, token_level=True), batch["response_mask"])
    assert values[0, 1] == values[1, 1] and (values[:, 1].abs() < 0.6).all()  # "the" says nothing yet
    assert values[0, 2] > 0.5 and values[1, 2] < -0.5 and values[0, -1] > 0.5 and values[1, -1] < -0.5


def make_trainer(lm, tokenizer, folder, rows=None, lora_r=0, **changes):
    settings = ValueTraining(
        **({"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0.0} | changes)
    )
    rows = rows or [EncodedResponse([5, 6], [7 + index % 9, 8, 2][: 1 + index % 3], index % 5) for index in range(32)]
    model = build_value_model(lm.requires_grad_(False), num_layers=1, lora_r=lora_r, input_skip=True)
    return ValueTrainer(
        model=model,
        args=training_arguments(settings, folder),
        settings=settings,
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=LoggedCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(tiny_lm, tiny_tokenizer, tmp_path):
    """Responses of 1 to 3 tokens: a mean of micro-batch means would weigh them otherwise."""
    moved = []
    for size, steps in ((8, 1), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = make_trainer(tiny_lm, tiny_tokenizer, tmp_path, **changes)
        trainer.train()
        moved.append({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})
    for name, weight in moved[0].items():
        torch.testing.assert_close(moved[1][name], weight, atol=1e-4, rtol=0)


def test_the_target_follows_every_step(tiny_lm, tiny_tokenizer, tmp_path):
    """Two steps at tau 0.5 from w0: 0.25 w0 + 0.25 w1 + 0.5 w2."""
    trainer = make_trainer(tiny_lm, tiny_tokenizer, tmp_path, max_steps=2, target_tau=0.5)
    name, seen = "head.weight", []
    seen.append(trainer.target.weights[name].clone())
    update = trainer.target.update

    def spy(model, tau):
        seen.append(model.head.weight.detach().clone())
        update(model, tau)

    trainer.target.update = spy
    trainer.train()
    assert len(seen) == 3 and not torch.equal(seen[1], seen[2])
    expected = 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]
    torch.testing.assert_close(trainer.target.weights[name], expected, atol=1e-6, rtol=0)


def test_evaluation_reports_error_and_explained_variance(tiny_lm, tiny_tokenizer, tmp_path):
    """A value of zero everywhere: the error is the root mean square of the rewards, and nothing is explained."""
    trainer = make_trainer(tiny_lm, tiny_tokenizer, tmp_path)
    figures = trainer.evaluate()
    rewards = torch.tensor([row.reward for row in trainer.eval_dataset], dtype=torch.float32)
    assert figures["eval_value_error"] == pytest.approx(rewards.square().mean().sqrt().item(), abs=1e-5)
    assert figures["eval_explained_variance"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_resuming_ends_where_an_uninterrupted_run_ends_target_included(tiny_lm, tiny_tokenizer, tmp_path, lora_r):
    whole = make_trainer(tiny_lm, tiny_tokenizer, tmp_path, lora_r=lora_r, max_steps=4, save_steps=2, target_tau=0.3)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / TARGET_NAME).is_file() and not (tmp_path / TARGET_NAME).exists()
    resumed = make_trainer(tiny_lm, tiny_tokenizer, tmp_path, lora_r=lora_r, max_steps=4, save_steps=2, target_tau=0.3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in whole.target.weights.items():
        torch.testing.assert_close(resumed.target.weights[name], weight, atol=1e-6, rtol=0)
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(other, weight, atol=1e-6, rtol=0, msg=name)
    (checkpoint / TARGET_NAME).unlink()
    with pytest.raises(ConfigError, match="has no target.safetensors; name a value's checkpoint"):
        make_trainer(tiny_lm, tiny_tokenizer, tmp_path, lora_r=lora_r).train(resume_from_checkpoint=str(checkpoint))


def test_lambda_one_needs_no_target_values(tiny_lm, tiny_tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_lm, tiny_tokenizer, tmp_path, td_lambda=1.0, max_steps=1)
    monkeypatch.setattr(trainer.target, "call", lambda *args, **kwargs: pytest.fail("the target was asked"))
    trainer.train()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(workplace, tmp_path):
    rows = toy_rows(64)
    for index, row in enumerate(rows):  # of 1 to 4 words: the global count is not twice the local one
        row["response"] = " ".join(row["response"].split()[: 1 + index % 4])
    write(tmp_path / "train.jsonl", rows)
    folders = []
    for processes, size in ((1, 8), (2, 4)):
        folders.append(tmp_path / f"by_{processes}")
        changes = {"max_steps": 4, "per_device_train_batch_size": size, "output_dir": folders[-1], "lora_r": 2}
        flags = workplace(**changes, warmup_ratio=0.0, fidelity_responses=0)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launch, "-m", "reward_models.train_value", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0, msg=name)


# Data ----------------------------------------------------------------------------------------------------------------


def test_rows_are_read_as_text_or_messages_and_a_function_fills_missing_rewards(tmp_path):
    messages = [{"role": "user", "content": "write one sentence"}]
    rows = [
        {"q": "write", "a": "good sea", "r": 2},
        {"q": messages, "a": [{"role": "assistant", "content": "a b c"}], "r": None},
        {"q": "write", "a": ""},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    columns = {"prompt_column": "q", "response_column": "a", "reward_column": "r"}
    read = load_logged(path, reward_function="length_words", **columns)
    assert [(row.prompt, row.response, row.reward) for row in read] == [
        ("write", "good sea", 2.0),
        (messages, "a b c", 3.0),
        ("write", "", 0.0),
    ]
    with pytest.raises(DataError, match=r"row 2: no reward in column 'r'; columns: q, a, r; name a reward_function"):
        load_logged(path, **columns)


def test_preference_pairs_give_each_response_once(tmp_path):
    rows = [
        {"prompt": "write", "chosen": "good", "rejected": "bad dog"},
        {"prompt": "write", "chosen": "good", "rejected": "a b c"},
        {"prompt": "describe", "chosen": "good", "rejected": "bad"},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    read = load_logged(path, reward_function="length_words")
    assert [(row.prompt, row.response, row.reward) for row in read] == [
        ("write", "good", 1.0),
        ("write", "bad dog", 2.0),
        ("write", "a b c", 3.0),
        ("describe", "good", 1.0),
        ("describe", "bad", 1.0),
    ]
    with pytest.raises(DataError, match="preference pairs have no rewards; name a reward_function"):
        load_logged(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "write", "reward": 1}, "row 1: no column 'response'"),
        ({"prompt": "write", "response": "a", "reward": "high"}, "row 1, column 'reward': expected a number, got"),
        ({"prompt": "", "response": "a", "reward": 1}, "row 1, column 'prompt': empty"),
        (
            {"prompt": "write", "response": [{"role": "user", "content": "a"}], "reward": 1},
            "column 'response': the last message must be the assistant's, got 'user'",
        ),
    ],
)
def test_faults_of_rows_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_logged(write(tmp_path / "rows.jsonl", [row]))


def test_long_responses_are_dropped_or_cut_and_counted(tiny_tokenizer, tmp_path):
    rows = [{"prompt": "write", "response": text, "reward": 1} for text in ("the sea", "the sea is a sea", "")]
    logged = load_logged(write(tmp_path / "rows.jsonl", rows))
    encoded, counts = encode_logged(tiny_tokenizer, logged, 64, 3)
    assert [len(row.response) for row in encoded] == [3, 1] and counts == {"over length, dropped": 1}
    encoded, counts = encode_logged(tiny_tokenizer, logged, 64, 3, truncate=True)
    assert [row.response[-1] == 2 for row in encoded] == [True, False, True] and counts == {"over length, cut": 1}
    with pytest.raises(DataError, match="1 of 3 responses would be dropped at max_length 64 .* raise the limits"):
        encode_logged(tiny_tokenizer, logged, 64, 3, max_dropped_share=0.2)


def test_responses_of_a_prompt_are_paired_once_and_equal_rewards_not_at_all():
    rows = [EncodedResponse([1], [index], reward) for index, reward in enumerate([0.0, 2.0, 1.0, 1.0, 5.0])]
    pairs = response_pairs([*rows, EncodedResponse([2], [9], 7.0)])
    assert [(pair.prompt, pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [([1], [1], [0], 2.0)]


def test_one_response_a_prompt_has_no_accuracy_and_equal_rewards_no_explained_variance(workplace, tmp_path, capsys):
    rows = [{"prompt": f"write about {word}", "response": "the sea is", "reward": 1} for word in ("dog", "cat", "rain")]
    write(tmp_path / "held_out.jsonl", rows)
    assert main(workplace(max_steps=5)) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["accuracy"] is None and figures["explained_variance"] is None and figures["value_error"] >= 0
    assert figures["fidelity"] is not None and read_card(tmp_path / "out").held_out_pairs == 0


def test_prompts_are_held_back_where_no_file_is_named(workplace, tmp_path):
    flags = workplace(max_steps=1, eval_share=0.4, fidelity_responses=0)
    place = flags.index("--eval_dataset")
    assert main(flags[:place] + flags[place + 2 :]) == 0
    card = read_card(tmp_path / "out")
    assert card.train_responses + card.held_out_responses == 200 and 40 < card.held_out_responses < 120


def test_a_value_that_is_still_zero_gets_its_card_and_a_warning(workplace, tmp_path, capsys):
    assert main(workplace(max_steps=1)) == 0
    assert "warning: gradient fidelity is not on the card" in capsys.readouterr().err
    assert read_card(tmp_path / "out").fidelity is None


def test_a_bad_setting_is_one_line_with_exit_code_2(workplace, capsys):
    assert run_main(main, workplace(td_lambda=1.5)) == 2
    assert "td_lambda must be in [0, 1], got 1.5" in capsys.readouterr().err
