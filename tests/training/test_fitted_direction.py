"""A direction that is fitted to the true rewards along, on whole runs of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reward_models.directions.saving import load_direction, load_steering
from tests.conftest import build_llama, build_tokenizer
from tests.training.tiny import settings, tiny_run, tiny_trainer
from vgf_llm.errors import CheckpointError, ConfigError, SettingError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.files import read_jsonl
from vgf_llm.text.stream import Steering
from vgf_llm.train import look_at_inputs
from vgf_llm.training.fitted_direction import STATE_NAME, FittedDirection
from vgf_llm.training.settings import DirectionOptions

KINDS = ("constant", "table", "causal")
ASKED: list[tuple[str, str]] = []


def counted(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of cheerful words, by texts that are noted."""
    ASKED.extend(zip(prompts, responses, strict=True))
    return [sum(word in ("good", "great", "happy", "love", "like") for word in text.split()) / 8 for text in responses]


def looked_at(prompts: list[str], responses: list[str]) -> list[float]:
    """A gold reward, by texts that are noted as such."""
    ASKED.extend((prompt, "gold: " + response) for prompt, response in zip(prompts, responses, strict=True))
    return [0.0] * len(responses)


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train with a direction, and return the log."""
    tiny_run(folder, **({"value": "reward", "direction": "table", "per_device_train_batch_size": 8} | changes))
    return list(read_jsonl(folder / "out" / "metrics.jsonl"))


def mean(lines: list[dict[str, Any]], name: str) -> float:
    return float(sum(line[name] for line in lines) / len(lines))


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_follows_the_reward_and_spends_its_budget(tmp_path: Path, kind: str) -> None:
    budget = TransportBudget(nats=1.5)
    lines = run(tmp_path, direction=kind, budget=budget, max_steps=8, num_particles=8)
    assert all(1.2 < line["nats/response"] <= 1.5 for line in lines)
    assert mean(lines[3:], "direction_correlation") > 0.7
    assert mean(lines, "reward/transported") > mean(lines, "reward/original") + 0.05
    assert all(line["reward_calls"] > 0 for line in lines)
    assert "displacement" not in lines[0] and "mmd2" not in lines[0] and "seconds/direction" in lines[0]
    folder = tmp_path / "out" / "direction"
    lm = build_llama()
    source = load_direction(folder, lm, build_tokenizer(), None)
    assert source.reads_hidden == (kind == "causal")
    steering = load_steering(folder, Steering(1.5, 1.0), longest=8)
    assert steering.variance is not None and steering.variance > 0
    assert steering.left_T is not None and len(steering.left_T) == 8
    facts = json.loads((folder / "direction.json").read_text())
    assert facts["kind"] == kind and facts["fitted_to"]["reward"] == "tests.training.tiny:good_words"


@pytest.mark.parametrize("kind", ["constant", "table"])
def test_a_planted_reward_is_learned_faster_than_by_the_best_of_n(tmp_path: Path, kind: str) -> None:
    found = {}
    for nats in (0.0, 2.0):
        folder = tmp_path / str(nats)
        folder.mkdir()
        run_ = {"budget": TransportBudget(nats=nats), "max_steps": 12, "kept": 2, "weight_temperature": 0.1}
        lines = run(folder, direction=kind, **run_)
        found[nats] = mean(lines[-4:], "reward/policy")
        assert all(line["nats/response"] == 0 and line["changed_tokens"] == 0 for line in lines) == (nats == 0)
    assert found[2.0] > found[0.0] + 0.03


def test_no_nats_give_the_originals_back_and_texts_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, value="reward", direction="table", budget=TransportBudget(nats=0.0), draws=2)
    trainer.model.eval()
    rows = trainer.prompts[:2]
    trainer.transport.begin_step([rows], 0)
    rollout = trainer.worker(rows, 0)
    outcome = rollout.outcome
    assert torch.equal(
        outcome.transported.take(torch.tensor([[0, 2, 4, 6]] * 2)).tokens_BNT, outcome.originals.tokens_BNT
    )
    assert float(outcome.nats_BN.abs().max()) == 0 and outcome.nats_BN.shape == (2, 8)
    one = trainer.worker(rows[1:], 0).outcome.transported
    length = one.tokens_BNT.shape[-1]
    assert torch.equal(one.tokens_BNT[0], outcome.transported.tokens_BNT[1][:, :length])


def test_every_distinct_text_is_asked_for_once_and_gold_never(tmp_path: Path) -> None:
    """One step, before it a fit to samples of its own: texts of swaps come behind those of their responses."""
    ASKED.clear()
    trainer = tiny_trainer(
        tmp_path, value="reward", direction="table", rewards=[f"{__name__}:counted"], gold=f"{__name__}:looked_at"
    )
    direction, rows = trainer.transport, trainer.prompts[:3]
    direction.begin_step([rows], 0)
    assert not [text for _, text in ASKED if text.startswith("gold")]
    assert trainer.metrics.means(trainer.accelerator)["reward_calls"] == len(ASKED)
    assert 0 < len(direction.replay) <= 3 * 4 * 16
    own = direction.replay.ids_O2
    assert (own[:, 0] != own[:, 1]).all() and not (own == 2).any()  # an EOS is neither moved nor put in
    rollout = trainer.worker(rows, 0)
    ASKED.clear()
    direction.see(rollout, 0)
    assert len(set(ASKED)) == len(ASKED) > 0
    before = direction.tensors
    direction.end_step(0)
    assert trainer.metrics.means(trainer.accelerator)["reward_calls"] == len(ASKED)
    assert not torch.equal(direction.tensors["bonus"], before["bonus"])


def test_changes_are_those_of_the_true_reward(tmp_path: Path) -> None:
    """A word of the list is worth 1/8 wherever it stands; so is a change from and to one, and nothing else."""
    trainer = tiny_trainer(tmp_path, value="reward", direction="table")
    trainer.transport.begin_step([trainer.prompts[:4]], 0)
    replay = trainer.transport.replay
    tokens = build_tokenizer().convert_tokens_to_ids(["good", "great", "happy", "love", "like"])
    is_good = torch.isin(replay.ids_O2, torch.tensor(tokens)).float()
    torch.testing.assert_close(replay.change_O, (is_good[:, 1] - is_good[:, 0]) / 8)
    assert (replay.logps_O2 < 0).all() and replay.hidden_OD.shape[1] == 0


def test_one_step_in_so_many_asks_and_the_replay_is_bounded(tmp_path: Path) -> None:
    options = DirectionOptions(substitutions=4, refit_steps=3, replay=100)
    lines = run(tmp_path, direction_options=options, max_steps=4, save_steps=4)
    assert [line.get("reward_calls", 0) > 0 for line in lines] == [True, False, False, True]
    state = load_file(tmp_path / "out" / "checkpoint-4" / STATE_NAME)
    assert len(state["replay.change_O"]) == 100


def test_accumulated_forwards_take_the_same_steps(tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((4, 1), (2, 2)):
        folder = tmp_path / str(batch)
        folder.mkdir()
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        lines = run(folder, direction="causal", max_steps=3, learning_rate=1e-3, **cut)
        tensors = load_file(folder / "out" / "direction" / "direction.safetensors")
        found.append((tensors, [line["direction_correlation"] for line in lines], [line["loss"] for line in lines]))
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, atol=1e-4, rtol=1e-3)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-3)
    assert found[1][2] == pytest.approx(found[0][2], abs=1e-4)


def test_a_pair_of_dpo_is_a_response_and_the_sample_that_it_shares_its_noise_with(tmp_path: Path) -> None:
    lines = run(tmp_path, loss="dpo", max_steps=3, particles_from="policy")
    assert lines[-1]["changed_tokens"] > 0 and lines[-1]["nats/response"] > 1


def test_rewards_with_running_statistics_start_the_replay_anew_after_the_first_step(tmp_path: Path) -> None:
    """Before it they have no scale: a length in words would outweigh all that comes after."""
    (tmp_path / "sum.yaml").write_text(
        'sum: [{reward: "tests.training.tiny:good_words", standardise: true}, '
        "{reward: length_words, standardise: true}]"
    )
    trainer = tiny_trainer(tmp_path, value="reward", direction="table", rewards=[str(tmp_path / "sum.yaml")])
    trainer.train()
    direction = trainer.transport
    steps = (direction.replay.response_O // 2**32).unique().tolist()
    assert steps == [1, 2, 3]
    trainer.save_model()
    facts = json.loads((tmp_path / "out" / "direction" / "direction.json").read_text())
    assert facts["fitted_to"]["reward"] == f"1 * {tmp_path / 'sum.yaml'}"


def test_a_run_without_a_swap_moves_nothing(tmp_path: Path) -> None:
    """One token of the shortlist alone is the greedy text: there is nothing to swap, and nothing to tilt."""
    lines = run(tmp_path, top_k=1, max_steps=2, save_steps=1)
    assert lines[-1]["nats/response"] == 0 and "direction_correlation" not in lines[-1]
    assert not (tmp_path / "out" / "direction").exists()
    tiny_run(
        tmp_path,
        value="reward",
        direction="table",
        per_device_train_batch_size=8,
        top_k=1,
        max_steps=3,
        save_steps=1,
        resume=True,
    )


def test_a_checkpoint_without_its_direction_is_named(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, value="reward", direction="constant")
    assert isinstance(trainer.transport, FittedDirection)
    with pytest.raises(CheckpointError, match=r"lacks direction_state\.safetensors, the direction"):
        trainer.checkpoints.load_transport(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "vllm"}, r"direction 'table' tilts every token .* backend must be transformers, got 'vllm'"),
        ({"value": "learned"}, "takes the place of a learned value: leave value out"),
        ({"decoder": "pivot"}, "leave decoder 'pivot' out"),
        ({"decoder_options": {"coupling": "none"}}, "leave decoder_options out"),
        ({"direction": "causal", "particles_from": "policy"}, "set particles_from to reference, or take direction c"),
        ({"budget": TransportBudget.none()}, r"for best-of-N set budget\.nats: 0"),
        ({"budget": TransportBudget(temperature=0.5)}, r"budget\.temperature does nothing"),
        ({"budget": TransportBudget(step_size=2.0)}, r"budget\.step_size does nothing"),
        ({"budget": TransportBudget(rounds=2)}, r"writes once: budget\.rounds must be 1, got 2"),
        ({"budget": TransportBudget(kernel="rbf")}, r"budget\.kernel must be none, got 'rbf'"),
    ],
)
def test_what_a_direction_does_not_go_with_is_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    parts = settings(tmp_path, **({"value": "reward", "direction": "table"} | changes))
    with pytest.raises(ConfigError, match=message):
        look_at_inputs(*parts[:4])


def test_values_out_of_range_are_refused_by_name() -> None:
    for key in ("substitutions", "refit_steps", "replay", "steps"):
        with pytest.raises(SettingError, match=key):
            DirectionOptions(**{key: 0})
