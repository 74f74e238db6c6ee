"""Reward models with an output per objective: both are learned, weights make one score of them, commands take it."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch

from reward_models import check, train
from reward_models.card import card_markdown, read_card
from reward_models.foreign import ForeignReward, foreign_reward
from reward_models.frame import identity_of
from reward_models.loading import load_adapter, load_reward_model, objectives_of, reward_model, save_reward_model
from reward_models.modelling import RewardModel
from reward_models.objective_trainer import ObjectiveTrainer
from reward_models.outputs import weights_by_name
from reward_models.pairs import EncodedPair, PairCollator, encode_pairs, stack_rows
from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining
from reward_models.value_model import build_value_model
from tests.conftest import build_llama, build_tokenizer
from tests.reward_models.test_training import toy_rows
from vgf_llm import generate
from vgf_llm.cli import run_main
from vgf_llm.data.encoding import encode_prompt, encode_response
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.errors import ConfigError, ModelError, SettingError
from vgf_llm.models.loading import fingerprint
from vgf_llm.runs.files import read_jsonl
from vgf_llm.runs.hf_arguments import training_arguments
from vgf_llm.training.rewards import load_rewards

COLUMNS = {"good": "good_chosen-good_rejected", "long": "longer"}
GOOD, PLAIN = ("good", "great", "happy", "love"), ("the", "a", "dog", "sea", "is", "tea", "old")
PROMPT, GOOD_SHORT, PLAIN_LONG = "write about dog", "the good dog", "the dog is a sea is old tea a dog"


def planted_rows(count, seed=0):
    """Either of two responses may hold a good word, and either may be longer: the objectives often disagree."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        good, long = (rng.choice((0, 1, None)) for _ in COLUMNS)
        if good is None and long is None:
            continue
        texts = []
        for side in (0, 1):
            words = [rng.choice(PLAIN) for _ in range(9 if side == long else 3)]
            if side == good:
                words[rng.randrange(len(words))] = rng.choice(GOOD)
            texts.append(" ".join(words))
        if texts[0] != texts[1]:
            row = {"prompt": f"write about {rng.choice(['dog', 'cat', 'rain', 'coffee', 'tea'])}", "chosen": texts[0]}
            differs = {"good_chosen": int(good == 0), "good_rejected": int(good == 1)}
            longer = None if long is None else (6, -6)[long]
            rows.append({**row, "rejected": texts[1], **differs, "longer": longer})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, planted pairs, and what `train.run` is given."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("objectives")
    build_llama().save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    write(folder / "train.jsonl", planted_rows(200))
    write(folder / "held_out.jsonl", planted_rows(60, seed=1))
    return folder


def trained(place, output, lora_r=0):
    script = RewardScript(
        str(place / "train.jsonl"),
        str(output),
        eval_dataset=str(place / "held_out.jsonl"),
        max_length=64,
        fidelity_responses=4,
        fidelity_substitutions=20,
        objectives=COLUMNS,
    )
    settings = RewardModelSettings(str(place / "base"), num_layers=1, lora_r=lora_r)
    rate = 1e-2 if lora_r else 3e-3
    return train.run(script, settings, RewardTraining(max_steps=60, learning_rate=rate, logging_steps=20))


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def folder(request, place):
    """A model of both objectives."""
    output = place / f"out_{request.param}"
    trained(place, output, request.param)
    return output


def scores(model, *texts):
    """Score texts as training encodes them, [R] or [R, K]."""
    tokenizer = build_tokenizer()
    rows = [(encode_prompt(tokenizer, PROMPT), encode_response(tokenizer, text, eos=True)) for text in texts]
    with torch.no_grad():
        return model(**stack_rows(rows, tokenizer.pad_token_id))


def test_both_are_learned_though_they_disagree(folder):
    rows = planted_rows(60, seed=1)
    assert sum((row["good_chosen"] - row["good_rejected"]) * (row["longer"] or 0) < 0 for row in rows) >= 10
    card = read_card(folder)
    stated = [sum(row["good_chosen"] != row["good_rejected"] for row in rows), sum(bool(row["longer"]) for row in rows)]
    assert [found["pairs"] for found in card.objectives.values()] == stated and list(card.objectives) == list(COLUMNS)
    for found in card.objectives.values():
        low, high = found["interval"]
        assert found["accuracy"] >= 0.9 and low < found["accuracy"] <= high
    assert card.held_out_pairs == 60 and card.fidelity["n"] == 4 and "good from good_chosen" in str(card.training)
    text = (folder / "README.md").read_text()
    assert text == card_markdown(card) and "mean of the 2 objectives (weights 1/2)" in text
    assert "| objective good | accuracy" in text and "outputs={'good': 1.0, 'long': 1.0})`" in text
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 3 and lines[-1]["accuracy/good"] >= 0.9 and lines[-1]["accuracy/long"] >= 0.9
    assert not any(key.startswith(("agree/", "stated/")) for key in lines[-1])


def test_weights_make_one_score_of_them_by_name_or_number(folder):
    assert objectives_of(folder) == ["good", "long"]
    apart = load_reward_model(folder, fold=False)
    found_RK = scores(apart, GOOD_SHORT, PLAIN_LONG)
    assert found_RK.shape == (2, 2) and found_RK[0, 0] > found_RK[1, 0] and found_RK[0, 1] < found_RK[1, 1]
    for outputs in ({"good": 1.0}, {"long": 1.0}, {"good": 2.0, "long": -0.5}, {"0": 1.0, "1": 1.0}):
        model = load_reward_model(folder, outputs=outputs)
        weights_K = torch.tensor(
            [outputs.get(name, outputs.get(at, 0.0)) for name, at in (("good", "0"), ("long", "1"))]
        )
        assert model.head.weight.shape == model.skip_head.weight.shape == (1, 32) and model.config.objectives == []
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.testing.assert_close(scores(model, GOOD_SHORT, PLAIN_LONG), found_RK @ weights_K, atol=1e-5, rtol=1e-5)
        assert model.reward_outputs == weights_by_name(["good", "long"], weights_K)
    assert load_reward_model(folder, outputs={"1": -0.2}).reward_outputs == {"long": -0.2}
    if (folder / "adapter_config.json").is_file():
        unmerged = load_reward_model(folder, outputs={"good": 1.0}, merge=False)
        torch.testing.assert_close(scores(unmerged, GOOD_SHORT), found_RK[:1, 0], atol=1e-5, rtol=1e-5)
        assert reward_model(load_adapter(folder)).config.objectives == ["good", "long"]


def test_weights_are_needed_and_outputs_have_names(folder):
    with pytest.raises(ConfigError, match=r"has 2 outputs \(good, long\); give their weights, for example"):
        load_reward_model(folder)
    with pytest.raises(ConfigError, match="has no output 'short'; it has good, long"):
        load_reward_model(folder, outputs={"short": 1.0})
    apart, tokens = load_reward_model(folder, fold=False), torch.tensor([[[7, 2]]])
    with pytest.raises(ModelError, match=r"an output per objective \(good, long\); load it with `load_reward_model`"):
        apart.score(apart.prefix([[5]]), tokens, tokens > 0)
    with pytest.raises(ModelError, match="an output per objective"):
        apart(torch.tensor([[5, 7, 2]]), response_mask=torch.tensor([[0, 1, 1]]), token_level=True)
    with pytest.raises(ModelError, match="an output per objective"):
        apart.read_tokens(torch.zeros(1, 32), torch.zeros(1, 32), 1)


def test_the_gradient_is_that_of_finite_differences_and_of_the_weighted_objectives(folder):
    """d/du (2 good - 0.5 long) = 2 d good / du - 0.5 d long / du."""
    tokens = torch.tensor([[[7, 8, 9, 2], [10, 11, 2, 0]]])
    mask, gradients = tokens > 0, {}
    for name, outputs in (("both", {"good": 2.0, "long": -0.5}), ("good", {"good": 1.0}), ("long", {"long": 1.0})):
        model = load_reward_model(folder, outputs=outputs).double()
        prefix, u = model.prefix([[1, 5, 6]]), model.embed(tokens).detach().requires_grad_(True)
        (gradients[name],) = torch.autograd.grad(model.score(prefix, u, mask).sum(), u)
        direction = torch.randn(u.shape, generator=torch.Generator().manual_seed(3)).double() * mask.unsqueeze(-1)
        with torch.no_grad():
            ends = [model.score(prefix, u + step * direction, mask).double().sum() for step in (1e-3, -1e-3)]
        assert (ends[0] - ends[1]).item() / 2e-3 == pytest.approx((gradients[name] * direction).sum().item(), rel=1e-2)
    torch.testing.assert_close(gradients["both"], 2 * gradients["good"] - 0.5 * gradients["long"], atol=1e-5, rtol=1e-4)


def test_commands_take_the_weights(folder, place, capsys):
    given = ["--model_name_or_path", str(place / "base"), "--reward_model", str(folder), "--prompt", PROMPT]
    given += ["--max_new_tokens", "4", "--num_particles", "2", "--draws", "1", "--device", "cpu"]
    assert run_main(generate.main, given) == 2
    assert "reward_outputs" in capsys.readouterr().err
    values = []
    for weight in ("1.0", "2.0"):  # best-of-N: the same responses
        assert run_main(generate.main, [*given, "--reward_outputs", f"{{long: {weight}}}", "--budget.steps", "0"]) == 0
        values.append(json.loads(capsys.readouterr().out.splitlines()[-1])["value"])
    assert values[0] != 0 and values[1] == pytest.approx(2 * values[0], rel=1e-3)
    asked = ["--reward_model", str(folder), "--dataset", str(place / "held_out.jsonl"), "--limit", "8", "--json"]
    assert run_main(check.main, asked) == 2
    capsys.readouterr()
    assert run_main(check.main, [*asked, "--reward_outputs", "{good: 1.0}"]) in (0, 1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lines"][0]["verdict"] == "pass"


def test_rewards_of_a_training_and_called_ones_take_the_weights(folder):
    tokenizer = build_tokenizer()
    (member,) = load_rewards([str(folder)], [], tokenizer, outputs={"long": 1.0}).members
    assert member.scorer.reward_outputs == {"long": 1.0} and member.scorer.head.weight.shape == (1, 32)
    other = build_tokenizer(chat=False)
    called = foreign_reward(folder, other, "cpu", torch.float32, {"long": 1.0})
    assert isinstance(called, ForeignReward)
    long, short = called([PROMPT, PROMPT], [PLAIN_LONG, GOOD_SHORT])
    assert long > short


def test_each_reward_of_a_training_gets_the_outputs_it_has(folder, tmp_path):
    tokenizer, other = build_tokenizer(), tmp_path / "other"
    for name, objectives in (("plain", []), ("other", ["kind", "brief"])):
        model = RewardModel.from_base(build_llama(), num_layers=1, objectives=objectives)
        save_reward_model(model, tmp_path / name)
    names = [str(folder), str(other), str(tmp_path / "plain"), "length_words"]
    members = load_rewards(names, [], tokenizer, outputs={"long": 1.0, "kind": 0.5}).members
    assert [member.scorer.reward_outputs for member in members[:3]] == [{"long": 1.0}, {"kind": 0.5}, {}]
    with pytest.raises(ConfigError, match="no model has an output 'short'; named outputs: good, long, kind, brief"):
        load_rewards(names, [], tokenizer, outputs={"long": 1.0, "short": 0.5})
    with pytest.raises(ConfigError, match=r"other' has 2 outputs \(kind, brief\); give their weights"):
        load_rewards(names, [], tokenizer, outputs={"long": 1.0})


def test_a_gold_of_several_outputs_asks_for_a_model_with_one(folder):
    with pytest.raises(ConfigError, match=r"has 2 outputs \(good, long\), and a gold reward or a part .* one output$"):
        load_rewards(["length_words"], [], build_tokenizer(), gold=str(folder))


def test_a_value_starts_from_one_output_alone(folder, place):
    lora_r = 4 if (folder / "adapter_config.json").is_file() else 0
    with pytest.raises(ModelError, match=r"has 2 objectives \(good, long\), and a value has one output"):
        build_value_model(build_llama().requires_grad_(False), lora_r=lora_r, start_from=folder)


@pytest.mark.parametrize("use_margin", [False, True])
def test_one_objective_is_todays_training_bit_for_bit(place, tmp_path, use_margin):
    """A margin that is above 0 in every row, once as the margin and once as an objective."""
    rows = write(tmp_path / "rows.jsonl", toy_rows(40))
    found = []
    for name, objectives in (("plain", {}), ("named", {"better": "margin"})):
        script = RewardScript(
            rows, str(tmp_path / name), eval_dataset=rows, max_length=64, fidelity_responses=0, objectives=objectives
        )
        training = RewardTraining(
            max_steps=4,
            logging_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            use_margin=use_margin,
            margin_scale=0.3,
        )
        card = train.run(script, RewardModelSettings(str(place / "base"), num_layers=1), training)
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        shown = [[line[key] for key in ("loss", "accuracy", "reward_mean")] for line in lines if "loss" in line]
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        found.append((weights, shown, card.accuracy, card.score_mean, card.calibration))
    assert found[0] == found[1] and len(found[0][1]) == 4
    assert card.objectives["better"]["accuracy"] == card.accuracy
    model = load_reward_model(tmp_path / "named")  # one output needs no weight
    assert torch.equal(scores(model, GOOD_SHORT), scores(load_reward_model(tmp_path / "plain"), GOOD_SHORT))
    assert model.reward_outputs == {} and load_reward_model(tmp_path / "named", outputs={"better": -1.0}).reward_outputs
    with pytest.raises(ConfigError, match="plain' has one output without a name; drop better"):
        load_reward_model(tmp_path / "plain", outputs={"better": 1.0})


def trainer_of(pairs, folder, size, accumulation):
    model = RewardModel.from_base(build_llama(), num_layers=1, objectives=["a", "b"])
    settings = RewardTraining(
        max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, learning_rate=1e-3
    )
    return ObjectiveTrainer(
        model=model,
        args=training_arguments(settings, folder),
        settings=settings,
        train_dataset=pairs,
        eval_dataset=pairs,
        data_collator=PairCollator(0),
    )


def uneven_pairs():
    """Pairs of which some state both objectives and some one."""
    pairs = [PreferencePair(row["prompt"], row["chosen"], row["rejected"]) for row in toy_rows(16)]
    encoded, _ = encode_pairs(build_tokenizer(), pairs, 64)
    differences = [(1.0, 0.0), (1.0, -2.0), (0.0, 1.0), (2.0, 1.0), (-1.0, 3.0)]
    return [EncodedPair(p.prompt, p.chosen, p.rejected, None, differences[i % 5]) for i, p in enumerate(encoded)]


def test_a_step_does_not_depend_on_how_it_is_cut_though_batches_state_unevenly(tmp_path):
    models = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = trainer_of(uneven_pairs(), tmp_path, size, accumulation)
        trainer.train()
        models.append(trainer.model)
    gaps = [(a - b).abs() for a, b in zip(*(model.parameters() for model in models), strict=True)]
    assert max(gap.max().item() for gap in gaps) < 2e-4
    assert torch.cat([gap.flatten() for gap in gaps]).mean() < 2e-6


def test_an_evaluation_counts_each_objective_over_the_pairs_that_state_it(tmp_path):
    trainer = trainer_of(uneven_pairs(), tmp_path, 4, 1)
    found, batch = trainer.evaluate(), PairCollator(0)(uneven_pairs())
    difference_BK = batch.pop("difference")
    with torch.no_grad():
        chosen_BK, rejected_BK = trainer.model(**batch).chunk(2)
    right_BK = ((chosen_BK - rejected_BK).sign() == difference_BK.sign()) & (difference_BK != 0)
    share_K = right_BK.sum(0) / (difference_BK != 0).sum(0)
    assert [found["eval_accuracy/a"], found["eval_accuracy/b"]] == pytest.approx(share_K.tolist())
    assert found["eval_accuracy"] == pytest.approx(float(right_BK.sum() / (difference_BK != 0).sum()))


def test_pairs_without_differences_keep_the_identity_of_earlier_versions(tmp_path):
    tokenizer, model = build_tokenizer(), RewardModel.from_base(build_llama(), num_layers=1)
    pairs = [EncodedPair([5], [6, 2], [7, 2], 0.5), EncodedPair([5], [8, 2], [9, 2])]
    expected = hashlib.sha256(
        json.dumps([[[5], [6, 2], [7, 2], 0.5], [[5], [8, 2], [9, 2], None]]).encode()
    ).hexdigest()
    found = {}
    for name, objectives in (("without", {}), ("with", {"a": "a"})):
        task = train._Pairs(RewardScript("x", "y", objectives=objectives), RewardTraining())
        found[name] = identity_of(task, RewardModelSettings(), RewardTraining(), pairs, fingerprint(tokenizer), model)
    assert found["without"]["dataset"] == expected and "objectives" not in found["without"]
    assert found["with"]["objectives"] == ["a"]


def test_a_configuration_of_an_earlier_version_is_read(tmp_path):
    model = RewardModel.from_base(build_llama(), num_layers=1).freeze()
    save_reward_model(model, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("objectives", None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = load_reward_model(tmp_path)
    assert again.config.objectives == [] and torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("objectives", [{"": "a"}, {"1": "a"}, {1: "a"}, {"a": " "}, {"a": 2}])
def test_names_and_columns_are_stated(objectives):
    with pytest.raises(SettingError, match="a column by each name, and no name a number"):
        RewardScript("x", "y", objectives=objectives)


def test_an_objective_that_no_training_pair_is_left_for_is_refused(place, tmp_path, capsys):
    rows = planted_rows(12)
    for row in rows:
        row |= {"rare": 0}
    rows[0] |= {"rare": 1, "chosen": "dog " * 70}
    flags = {
        "train_dataset": write(tmp_path / "rows.jsonl", rows),
        "eval_dataset": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "model_name_or_path": place / "base",
        "max_length": 64,
        "objectives": "{good: good_chosen-good_rejected, long: longer, rare: rare}",
    }
    assert run_main(train.main, [part for key, value in flags.items() for part in (f"--{key}", str(value))]) == 2
    assert "no pair that is left has an opinion on the objective 'rare' (column 'rare')" in capsys.readouterr().err
