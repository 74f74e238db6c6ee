"""Training end to end on tiny models: it learns, moves what it should, resumes, and names what is wrong at once."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from reward_models.card import read_card
from reward_models.loading import load_reward_model
from reward_models.modelling import RewardModel
from reward_models.noise import add_embedding_noise
from reward_models.pairs import EncodedPair, PairCollator, encode_pairs, hold_out
from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining
from reward_models.train import main, run
from reward_models.trainer import RewardTrainer
from vgf_llm.cli import run_main
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.runs.hf_arguments import training_arguments
from vgf_llm.runs.resume import check_resume

GOOD, BAD, FILLER = (
    ["good", "great", "happy", "love"],
    ["bad", "awful", "sad", "hate"],
    ["the", "a", "dog", "sea", "is"],
)
FIELDS = (RewardScript, RewardModelSettings, RewardTraining)


def toy_rows(count, seed=0):
    """Responses of four words; the chosen one has a good word where the rejected one has a bad word."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        words = [rng.choice(FILLER) for _ in range(3)]
        place = rng.randrange(4)
        chosen, rejected = ([*words[:place], rng.choice(kind), *words[place:]] for kind in (GOOD, BAD))
        prompt = f"write about {rng.choice(['dog', 'cat', 'rain', 'coffee', 'tea'])}"
        rows.append(
            {"prompt": prompt, "chosen": " ".join(chosen), "rejected": " ".join(rejected), "margin": 1 + index % 3}
        )
    return rows


@pytest.fixture
def workplace(tmp_path, tiny_lm, tiny_tokenizer):
    """A folder with a base model and pairs; returns a function that writes flags for `main`."""
    tiny_lm.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for name, count, seed in (("train", 200, 0), ("held_out", 40, 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(count, seed)))

    def flags(**changes):
        values = {
            "train_dataset": tmp_path / "train.jsonl",
            "eval_dataset": tmp_path / "held_out.jsonl",
            "output_dir": tmp_path / "out",
            "model_name_or_path": tmp_path / "base",
            "num_layers": 1,
            "max_length": 64,
            "learning_rate": 3e-3,
            "max_steps": 40,
            "fidelity_responses": 4,
            "fidelity_substitutions": 20,
        } | changes
        return [token for key, value in values.items() for token in (f"--{key}", str(value))]

    return flags


@pytest.mark.parametrize("lora_r", [0, 4])
def test_it_learns_a_toy_preference_and_the_folder_holds_all_of_it(
    workplace, tmp_path, tiny_lm, tiny_tokenizer, capsys, lora_r
):
    assert main(workplace(lora_r=lora_r, learning_rate=1e-2 if lora_r else 3e-3)) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["accuracy"] >= 0.9 and figures["steps"] == 40
    card = read_card(tmp_path / "out")
    assert card.accuracy == figures["accuracy"] and card.held_out_pairs == 40 and card.train_pairs == 200
    assert card.adapter == bool(lora_r) and card.fidelity["n"] == 4 and len(card.accuracy_by_margin) == 3
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "README.md").is_file()
    model = load_reward_model(tmp_path / "out", tokenizer=tiny_tokenizer)
    pairs, _ = encode_pairs(tiny_tokenizer, [PreferencePair("write about dog", "good dog", "bad dog")], 64)
    batch = PairCollator(0)(pairs)
    batch.pop("margin")
    chosen, rejected = model(**batch).tolist()
    assert chosen > rejected
    assert torch.equal(model.embedding_table_VD, tiny_lm.get_input_embeddings().weight)


def make_trainer(lm, tokenizer, tmp_path, steps=2, **changes):
    settings = RewardTraining(max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, **changes)
    pairs = [PreferencePair(row["prompt"], row["chosen"], row["rejected"], row["margin"]) for row in toy_rows(32)]
    encoded, _ = encode_pairs(tokenizer, pairs, 64)
    return RewardTrainer(
        model=RewardModel.from_base(lm, num_layers=1),
        args=training_arguments(settings, tmp_path),
        settings=settings,
        train_dataset=encoded,
        eval_dataset=encoded[:8],
        data_collator=PairCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


def test_trained_parameters_move_and_the_embeddings_do_not(any_lm, tiny_tokenizer, tmp_path):
    trainer = make_trainer(any_lm, tiny_tokenizer, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    table = id(trainer.model.get_input_embeddings().weight)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) == table), name


def test_the_head_can_have_its_own_learning_rate(tiny_lm, tiny_tokenizer, tmp_path):
    trainer = make_trainer(tiny_lm, tiny_tokenizer, tmp_path, head_learning_rate=0.5, warmup_ratio=0.0)
    groups = trainer.create_optimizer().param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.5 if name.startswith("head.") else 1e-3), name
    assert sum(len(group["params"]) for group in groups) == len(rates)
    trainer.optimizer = None
    trainer.train()


def test_metrics_are_logged_and_evaluation_counts_pairs(tiny_lm, tiny_tokenizer, tmp_path):
    trainer = make_trainer(tiny_lm, tiny_tokenizer, tmp_path, logging_steps=1, use_margin=True, bf16=True)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"accuracy", "reward_margin", "reward_mean", "reward_std"} <= set(line)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_accumulated_small_batches_equal_one_large_batch(tiny_lm, tiny_tokenizer, tmp_path):
    models = []
    for size, accumulation in ((4, 1), (2, 2)):
        settings = RewardTraining(
            max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, learning_rate=1e-3
        )
        trainer = make_trainer(tiny_lm, tiny_tokenizer, tmp_path)
        trainer = RewardTrainer(
            model=RewardModel.from_base(tiny_lm, num_layers=1),
            args=training_arguments(settings, tmp_path),
            settings=settings,
            train_dataset=trainer.train_dataset,
            data_collator=PairCollator(0),
        )
        trainer.train()
        models.append(trainer.model)
    gaps = [(a - b).abs() for a, b in zip(*(m.parameters() for m in models), strict=True)]
    assert max(gap.max().item() for gap in gaps) < 2e-4
    assert torch.cat([gap.flatten() for gap in gaps]).mean() < 2e-6


def test_a_resumed_run_ends_where_the_whole_one_does(workplace, tmp_path):
    whole = workplace(output_dir=tmp_path / "whole", max_steps=6, fidelity_responses=0)
    parts = {"output_dir": tmp_path / "parts", "fidelity_responses": 0, "save_steps": 3, "max_steps": 6}
    assert main(whole) == 0 and main(workplace(**parts)) == 0
    (tmp_path / "parts" / "model.safetensors").unlink()
    assert main(workplace(**parts, resume=tmp_path / "parts" / "checkpoint-3")) == 0
    one, two = (load_reward_model(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_noise_is_added_in_training_only_and_ends_when_removed(tiny_lm):
    model = RewardModel.from_base(tiny_lm, num_layers=1)
    tokens = torch.arange(5, 45)[None]
    clean = model.embed(tokens).detach()
    handle = add_embedding_noise(model, 0.5)
    assert torch.equal(model.embed(tokens), clean)
    noise = (model.train().embed(tokens) - clean).detach()
    assert noise.std().item() == pytest.approx(0.5 * clean.square().mean().sqrt().item(), rel=0.15)
    handle.remove()
    assert torch.equal(model.embed(tokens), clean)


def test_long_pairs_are_dropped_or_cut_and_counted(tiny_tokenizer):
    pairs = [
        PreferencePair("dog", "good " * 9, "bad"),
        PreferencePair("dog", "good", "bad"),
        PreferencePair("dog", "x", "y"),
    ]
    prompt_tokens = len(encode_pairs(tiny_tokenizer, pairs[1:2], 64)[0][0].prompt)
    kept, counts = encode_pairs(tiny_tokenizer, pairs, 64, max_response_length=4)
    assert len(kept) == 1 and counts == {"over length, dropped": 1, "equal once encoded": 1}
    assert kept[0].chosen[-1] == tiny_tokenizer.eos_token_id
    kept, counts = encode_pairs(tiny_tokenizer, pairs[:2], 64, max_response_length=4, truncate=True)
    assert counts == {"over length, cut": 1}
    assert len(kept[0].chosen) == 4 and tiny_tokenizer.eos_token_id not in kept[0].chosen
    with pytest.raises(DataError, match="no pair of 3 is left at max_length"):
        encode_pairs(tiny_tokenizer, pairs, prompt_tokens)
    with pytest.raises(DataError, match="2 of 3 pairs would be dropped .* 1 over length, dropped, 1 equal once"):
        encode_pairs(tiny_tokenizer, pairs, 64, max_response_length=4, max_dropped_share=0.5)


def test_held_out_prompts_are_not_trained_on():
    pairs = [PreferencePair(f"p{index % 5}", "a", "b") for index in range(20)]
    train, held = hold_out(pairs, 0.2, seed=0)
    assert len(train) == 16 and len(held) == 4
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held}
    with pytest.raises(DataError, match="name an eval_dataset"):
        hold_out(pairs[:1], 0.2, seed=0)


def test_the_collator_puts_chosen_first_and_masks_padding():
    batch = PairCollator(9)([EncodedPair([5], [6, 7], [8], 0.5), EncodedPair([5, 5], [6], [7])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 5, 6], [5, 8, 9], [5, 5, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert batch["response_mask"].tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert batch["margin"].tolist() == [0.5, 0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num_layers", "9"], "num_layers is 9, but the base model has layers 1 to 2"),
        (["--pad_token", "<none>"], "pad_token '<none>' is not in the vocabulary"),
        (["--train_dataset", "missing.jsonl"], "missing.jsonl"),
        (["--trainer_arguments", '{"adam_betta1": 0.9}'], "nearest: 'adam_beta1'"),
        (["--trainer_arguments", '{"seed": 1}'], "'seed' has a key of its own here; write 'seed: 1'"),
        (["--resume", "last"], "resume: 'last' is not a folder; write true"),
        (["--resume_from_checkpoint", "last"], "has another name now; write '--resume true'"),
        (["--learning_rate", "0"], "learning_rate must be above 0"),
        (["--poling", "mean"], "nearest: '--pooling'"),
        (["--max_length", "3"], "training: no pair of 200 is left"),
        (["--max_length", "129"], "max_length is 129 tokens, but the base model has 128 positions"),
    ],
)
def test_bad_inputs_end_with_code_2_and_a_message(workplace, capsys, extra, message):
    assert run_main(main, [*workplace(), *extra]) == 2
    assert message in capsys.readouterr().err


def test_pairs_over_length_count_against_the_allowed_share(workplace, tmp_path, capsys):
    rows = toy_rows(40)
    for row in rows[:10]:
        row["chosen"] += " dog" * 9
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = workplace(train_dataset=tmp_path / "long.jsonl", max_response_length=8, max_steps=1, fidelity_responses=0)
    assert run_main(main, flags) == 2
    assert "training: 10 of 40 pairs would be dropped" in capsys.readouterr().err
    assert run_main(main, [*flags, "--max_dropped_share", "0.25"]) == 0


def test_an_output_folder_that_is_a_file_is_refused_first(workplace, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run_main(main, workplace(train_dataset="missing.jsonl")) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_tokenizer_without_pad_token_trains_the_same_model(workplace, tmp_path, tiny_tokenizer):
    """Padding is masked, so it may be filled with the EOS, as GPT-2's has to be."""
    scores = []
    for pad in ("<pad>", None):
        tiny_tokenizer.pad_token = pad
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        assert run_main(main, workplace(max_steps=2, fidelity_responses=0)) == 0
        card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
        scores.append((card["score_mean"], card["score_std"], card["accuracy"]))
    assert scores[0] == scores[1]


def test_resume_names_a_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder; true takes the newest checkpoint"):
        check_resume(RewardTraining(resume=str(tmp_path / "no")).resume, tmp_path)


@pytest.mark.parametrize("cls", FIELDS)
def test_settings_are_few_and_every_field_is_explained(cls):
    import ast
    import inspect

    assert len(dataclasses.fields(cls)) <= 25
    (body,) = (node.body for node in ast.walk(ast.parse(inspect.getsource(cls))) if isinstance(node, ast.ClassDef))
    for node, following in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), ast.unparse(node)


def test_a_share_of_the_training_prompts_is_held_out_without_an_eval_dataset(workplace, tmp_path):
    script = RewardScript(
        str(tmp_path / "train.jsonl"), str(tmp_path / "out"), eval_share=0.2, fidelity_responses=0, max_length=64
    )
    card = run(script, RewardModelSettings(str(tmp_path / "base"), num_layers=1), RewardTraining(max_steps=1))
    assert card.train_pairs + card.held_out_pairs == 200 and 20 < card.held_out_pairs < 60
