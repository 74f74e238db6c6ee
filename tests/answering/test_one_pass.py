"""The decoder ``stream`` in the commands, on tiny models."""

import json

import pytest
import torch

from reward_models.directions.saving import FittedTo, save_direction
from reward_models.directions.settings import FOLDER_NAME
from reward_models.loading import save_reward_model
from reward_models.modelling import RewardModel
from vgf_llm import evaluate, generate, transport
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.answering.one_pass import Directions, calibrate, stream_sampler
from vgf_llm.errors import ConfigError, ModelError, SettingError
from vgf_llm.evaluation.arms import Arm
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.files import read_jsonl
from vgf_llm.serving.settings import ServeSettings
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.bonus import TableBonus
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.training.settings import VGFSettings

BUDGET = TransportBudget(nats=1.0, max_token_nats=0.5)


@pytest.fixture
def value(tiny_lm):
    return RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean").freeze()


@pytest.fixture
def reference(tiny_lm):
    return TorchReference(tiny_lm, SamplingSettings(top_k=8, max_new_tokens=6), (2,), 0)


@pytest.fixture
def folders(tmp_path, tiny_lm, tiny_tokenizer, value):
    base, reward = tmp_path / "base", tmp_path / "reward"
    tiny_lm.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    save_reward_model(value, reward)
    tiny_tokenizer.save_pretrained(reward)
    return base, reward


@pytest.fixture
def argv(folders):
    base, reward = folders
    return [
        "--model_name_or_path", str(base), "--reward_model", str(reward), "--device", "cpu", "--dtype", "float32",
        "--max_new_tokens", "6", "--top_k", "8", "--num_particles", "4",
    ]  # fmt: skip


def test_the_texts_are_drawn_at_once_and_the_best_is_selected(reference, value):
    policy = make_policy(ImplicitPolicy, reference, value, BUDGET, "stream", draws=2, length_unit=1.0)
    outcome = policy([[5, 6, 7], [8, 9]], row_seeds(0, [0, 1], 3))
    assert outcome.one_pass and outcome.transported.tokens_BNT.shape[:2] == (2, 6)
    assert outcome.nats_BN.shape == (2, 6) and float(outcome.nats_BN.max()) <= 1.0 + 1e-5
    best_B = outcome.transported_values_BN.max(1).values
    torch.testing.assert_close(outcome.selected_values_B, best_B)
    again = policy.improve(outcome.originals.first(3), row_seeds(0, [0, 1], 3))
    assert torch.equal(again.transported.tokens_BNT, outcome.transported.tokens_BNT)


def test_the_empty_budget_is_best_of_n(reference, value):
    policy = make_policy(ImplicitPolicy, reference, value, TransportBudget.none(), "stream", length_unit=1.0)
    outcome = policy([[5, 6, 7]], row_seeds(0, [0], 3))
    plain = ReferenceSampler(reference).sample([[5, 6, 7]], row_seeds(0, [0], 3))
    assert torch.equal(outcome.originals.tokens_BNT, plain.tokens_BNT) and not outcome.one_pass


def test_a_fitted_direction_is_found_beside_the_reward_model(folders, reference, value, tiny_lm, tiny_tokenizer):
    base, reward = folders
    fitted_to = FittedTo.of(str(reward), str(base), tiny_lm, tiny_tokenizer)
    bonus = TableBonus(torch.randn(len(value.embedding_table_VD)))
    steering = {"variance": 0.5, "left": [6, 5, 4, 3, 2, 1]}
    save_direction(bonus, "constant", reward / FOLDER_NAME / "constant", fitted_to, steering=steering)
    own = Directions(tiny_tokenizer, str(reward))
    stream = stream_sampler(reference, value, BUDGET, {"direction": "constant"}, own)
    assert torch.equal(stream.source.bonus_V, bonus.bonus_V)
    assert stream.steering.variance == 0.5 and stream.steering.left_T.tolist() == steering["left"]
    assert (stream.steering.nats, stream.steering.max_token_nats) == (1.0, 0.5)
    by_folder = stream_sampler(reference, value, BUDGET, {"direction": str(reward / FOLDER_NAME / "constant")}, own)
    assert torch.equal(by_folder.source.bonus_V, bonus.bonus_V)
    with torch.no_grad():
        value.head.weight.add_(1.0)
    save_reward_model(value, reward)
    with pytest.raises(ModelError, match="was fitted to"):
        stream_sampler(reference, value, BUDGET, {"direction": "constant"}, own)


def test_a_fitted_direction_serves_the_weights_of_outputs_in_use(folders, reference, value, tiny_lm, tiny_tokenizer):
    base, reward = folders
    fitted_to = FittedTo.of(str(reward), str(base), tiny_lm, tiny_tokenizer, {"good": 1.0})
    bonus, folder = TableBonus(torch.randn(len(value.embedding_table_VD))), reward / FOLDER_NAME / "constant"
    save_direction(bonus, "constant", folder, fitted_to)
    own = Directions(tiny_tokenizer, str(reward))
    value.reward_outputs = {"good": 1.0}
    stream_sampler(reference, value, BUDGET, {"direction": "constant"}, own)
    value.reward_outputs = {"good": 2.0}
    for name in ("constant", str(folder), f"{folder}/../constant"):
        with pytest.raises(ModelError, match="was fitted to reward_outputs"):
            stream_sampler(reference, value, BUDGET, {"direction": name}, own)
    elsewhere = reward.parent / "elsewhere"
    save_direction(bonus, "constant", elsewhere, fitted_to)
    stream_sampler(reference, value, BUDGET, {"direction": str(elsewhere)}, own)  # it may be of another reward


def test_a_direction_of_a_function_is_named_by_its_folder(folders, reference, value, tiny_lm, tiny_tokenizer, tmp_path):
    base, reward = folders
    own = tmp_path / "brief"
    bonus = TableBonus(torch.randn(len(value.embedding_table_VD)))
    save_direction(bonus, "table", own, FittedTo.of("length_words", str(base), tiny_lm, tiny_tokenizer))
    stream = stream_sampler(reference, value, BUDGET, {"direction": str(own)}, Directions(tiny_tokenizer, str(reward)))
    assert torch.equal(stream.source.bonus_V, bonus.bonus_V)


def test_a_lookahead_is_steered_by_plain_samples_to_the_first_prompts(reference, value):
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12]]
    policies = [make_policy(ImplicitPolicy, reference, value, BUDGET, "stream", length_unit=1.0) for _ in range(2)]
    for policy in policies:
        calibrate(policy, prompts)
        assert policy.decoder.steering.variance > 0 and len(policy.decoder.steering.left_T) == 6
    together = policies[0](prompts, row_seeds(0, [0, 1, 2], 2)).transported.tokens_BNT
    alone = policies[1](prompts[1:2], row_seeds(0, [1], 2)).transported.tokens_BNT
    assert torch.equal(alone[0], together[1][:, : alone.shape[-1]])


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ({"direction": "causal"}, BUDGET, "there is no direction 'causal'.*vgf-llm direction --kind causal"),
        ({"direction": "up"}, BUDGET, "neither lookahead"),
        ({"candidates": 1}, BUDGET, "candidates must be an integer of at least 2, got 1"),
        ({"min_probability": 1.0}, BUDGET, "min_probability must be in"),
        ({"candidates": 4, "direction": "constant"}, BUDGET, "candidates belongs to the direction lookahead"),
        ({"speed": 2}, BUDGET, "has no option 'speed'"),
        ({}, TransportBudget(rounds=2), "budget.rounds must be 1, got 2"),
        ({}, TransportBudget(kernel="rbf"), "budget.kernel must be none"),
        ({}, TransportBudget(step_size=2.0), "budget.step_size does nothing"),
    ],
)
def test_what_one_pass_cannot_do_is_refused(options, budget, message, folders, reference, value, tiny_tokenizer):
    with pytest.raises(ConfigError, match=message):
        stream_sampler(reference, value, budget, options, Directions(tiny_tokenizer, str(folders[1])))


def test_generate_answers_in_one_pass(argv, capsys):
    assert generate.main([*argv, "--decoder", "stream", "--prompt", "write about the sea"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["source"] is None and row["original"] is None
    assert 0 < row["distance"]["nats"] <= 2.0 and row["distance"]["displacement"] is None


def test_transport_writes_texts_and_says_that_there_are_no_pairs(argv, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"write about the {word}"}) + "\n" for word in ("sea", "dog")))
    output = ["--decoder", "stream", "--prompts", str(prompts), "--output_dir", str(tmp_path / "run")]
    assert transport.main([*argv, *output]) == 0
    captured = capsys.readouterr()
    counts = json.loads(captured.out.splitlines()[-1])
    assert counts["sft"] + sum(counts["sft_skipped"].values()) == 2
    assert counts["dpo"] == 0 and counts["dpo_skipped"]["no_source"] == 2
    assert "no sample to pair with" in captured.err


def test_evaluate_compares_it_with_two_passes(argv, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"write about the {word}"}) + "\n" for word in ("sea", "dog")))
    arms = [
        {"name": "two passes", "num_particles": 3, "budget": {"nats": 1.0}},
        {"name": "one pass", "num_particles": 3, "budget": {"nats": 1.0}, "decoder": "stream"},
        {"name": "best-of-3", "num_particles": 3},
    ]
    config = tmp_path / "evaluate.yaml"
    config.write_text(json.dumps({"arms": arms}))
    flags = ["--config", str(config), "--prompts", str(prompts), "--gold", "length_words"]
    flags += ["--output_dir", str(tmp_path / "run"), "--budgets", "[]", "--best_of", "[]"]
    assert evaluate.main([*argv[:-2], *flags]) == 0
    rows = {(row["arm"], row["prompt_index"]): row for row in read_jsonl(tmp_path / "run" / "rows.jsonl")}
    for index in range(2):
        row = rows["one pass", index]
        assert row["changed"] is None and row["displacement"] is None
        assert len(row["texts"]) == 3 and max(row["nats"]) <= 1.0 + 1e-4
        assert row["tflops"] > rows["best-of-3", index]["tflops"]  # candidates are read too


def test_what_cannot_stream_is_told_before_a_model_is_loaded(argv):
    with pytest.raises(ConfigError, match="needs backend transformers, got 'vllm'"):
        generate.main([*argv, "--decoder", "stream", "--backend", "vllm", "--prompt", "write about the sea"])
    with pytest.raises(SettingError, match="value with the decoder stream"):
        Arm(decoder="stream", direction="random")


def test_commands_that_do_not_have_it_yet_say_so():
    for settings, message in ((ServeSettings, "not stream yet"), (VGFSettings, "to write in one pass, set direction")):
        with pytest.raises(SettingError, match=message):
            settings(decoder="stream")
