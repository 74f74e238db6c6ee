"""A direction on disk is whole or absent, comes back as it was, and serves what it was fitted to alone."""

from __future__ import annotations

import json

import pytest
import torch

from reward_models.directions import saving
from reward_models.directions.causal import CausalDirection, CausalHead
from reward_models.directions.positions import bonuses_along
from reward_models.directions.saving import FACTS_NAME, WEIGHTS_NAME, FittedTo, load_direction, save_direction
from reward_models.folder import clear_earlier_run
from reward_models.loading import save_reward_model
from reward_models.secant import weights_digest
from tests.conftest import build_llama, build_tokenizer
from tests.reward_models.directions.planted import prompts_of, sampled
from tests.reward_models.test_secant import value_model
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import input_table
from vgf_llm.text.bonus import TableBonus


def causal_of(lm, seed=0):
    head = CausalHead(32, 32, len(input_table(lm)), units=8, seed=seed)
    torch.nn.init.normal_(head.second.weight)
    head.unit.fill_(0.5)
    head.constant.normal_()
    head.rest.normal_()
    return CausalDirection.of(head.requires_grad_(False), input_table(lm).detach())


@pytest.mark.parametrize("kind", ["table", "constant", "causal"])
def test_it_comes_back_as_it_was(kind, tiny_lm, tiny_tokenizer, tmp_path):
    direction = causal_of(tiny_lm) if kind == "causal" else TableBonus(torch.randn(len(input_table(tiny_lm))))
    fitted_to = FittedTo.of("vader_compound", "base", tiny_lm, tiny_tokenizer)
    save_direction(direction, kind, tmp_path / "new", fitted_to, calls=7)
    again = load_direction(tmp_path / "new", tiny_lm, tiny_tokenizer)
    positions = sampled(tiny_lm, prompts_of(2))
    assert torch.equal(bonuses_along(again, positions), bonuses_along(direction, positions))
    facts = json.loads((tmp_path / "new" / FACTS_NAME).read_text())
    assert facts["kind"] == kind and facts["calls"] == 7 and len(facts["fitted_to"]["reward_sha256"]) == 64
    assert again.reads_hidden is (kind == "causal") and again.passes == 0


def test_a_kill_leaves_the_old_pair_or_the_new(tiny_lm, tiny_tokenizer, tmp_path, monkeypatch):
    old, new = causal_of(tiny_lm), causal_of(tiny_lm, seed=1)
    fitted_to = FittedTo.of("vader_compound", "base", tiny_lm, tiny_tokenizer)
    save_direction(old, "causal", tmp_path, fitted_to)

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("save_file", "write_json_atomic"):  # before and after the weights are written
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(saving, name, killed)
            save_direction(new, "causal", tmp_path, fitted_to)
        head = load_direction(tmp_path, tiny_lm, tiny_tokenizer).head
        assert torch.equal(head.first.weight, old.head.first.weight)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # in place, and not yet moved
        patch.setattr("vgf_llm.runs.result._move", killed)
        save_direction(new, "causal", tmp_path, fitted_to)
    head = load_direction(tmp_path, tiny_lm, tiny_tokenizer).head
    assert torch.equal(head.first.weight, new.head.first.weight)


def test_other_weights_of_the_rewards_outputs_are_refused(tiny_lm, tiny_tokenizer, tmp_path):
    table = TableBonus(torch.randn(len(input_table(tiny_lm))))
    fitted_to = FittedTo.of("vader_compound", "base", tiny_lm, tiny_tokenizer, {"good": 1.0})
    save_direction(table, "table", tmp_path, fitted_to)
    for outputs in (None, {"good": 1.0}):
        load_direction(tmp_path, tiny_lm, tiny_tokenizer, outputs=outputs)
    with pytest.raises(ModelError, match=r"fitted to reward_outputs \{'good': 1.0\}, and those in use are \{'long'"):
        load_direction(tmp_path, tiny_lm, tiny_tokenizer, outputs={"long": 1.0})
    facts = json.loads((tmp_path / FACTS_NAME).read_text())
    del facts["fitted_to"]["reward_outputs"]  # as earlier versions wrote it
    (tmp_path / FACTS_NAME).write_text(json.dumps(facts))
    load_direction(tmp_path, tiny_lm, tiny_tokenizer, outputs={"long": 1.0})


def test_other_weights_and_tokens_are_refused(tiny_lm, tiny_tokenizer, tmp_path):
    fitted_to = FittedTo.of("vader_compound", "my_base", tiny_lm, tiny_tokenizer)
    save_direction(causal_of(tiny_lm), "causal", tmp_path / "causal", fitted_to)
    table = TableBonus(torch.randn(len(input_table(tiny_lm))))
    save_direction(table, "table", tmp_path / "table", fitted_to)
    other = build_llama(seed=5)
    with pytest.raises(ModelError, match="hidden states of 'my_base' as it was"):
        load_direction(tmp_path / "causal", other, tiny_tokenizer)
    assert torch.equal(load_direction(tmp_path / "table", other, tiny_tokenizer).bonus_V, table.bonus_V)
    changed = build_tokenizer()
    changed.add_tokens(["extra"])
    for kind in ("causal", "table"):
        with pytest.raises(ModelError, match="fitted to another tokenizer"):
            load_direction(tmp_path / kind, tiny_lm, changed)
    with pytest.raises(ModelError, match="'length_words' has"):
        load_direction(tmp_path / "table", tiny_lm, tiny_tokenizer, reward="length_words")
    for dtype in (torch.bfloat16, torch.float16):  # the mark is the same in bfloat16, and there is none in float16
        again = load_direction(tmp_path / "causal", build_llama().to(dtype), tiny_tokenizer)
        assert again.head.first.weight.dtype == torch.float32


def test_a_direction_of_a_reward_model_knows_its_weights(tiny_lm, tiny_tokenizer, tmp_path):
    value, reward = value_model(tiny_lm), tmp_path / "reward"
    save_reward_model(value, reward)
    before = weights_digest(reward)
    fitted_to = FittedTo.of(str(reward), "base", tiny_lm, tiny_tokenizer)
    save_direction(causal_of(tiny_lm), "causal", reward / "directions" / "causal", fitted_to)
    assert weights_digest(reward) == before
    load_direction(reward / "directions" / "causal", tiny_lm, tiny_tokenizer)
    with torch.no_grad():
        value.head.bias.add_(1.0)
    save_reward_model(value, reward)
    with pytest.raises(ModelError, match="was fitted to .* with SHA-256"):
        load_direction(reward / "directions" / "causal", tiny_lm, tiny_tokenizer)
    clear_earlier_run(reward)
    assert not (reward / "directions").exists()


def test_torn_and_missing_files_are_named(tiny_lm, tiny_tokenizer, tmp_path):
    with pytest.raises(ModelError, match=r"has no direction\.json; fit it with"):
        load_direction(tmp_path, tiny_lm, tiny_tokenizer)
    fitted_to = FittedTo.of("vader_compound", "base", tiny_lm, tiny_tokenizer)
    save_direction(TableBonus(torch.randn(7)), "table", tmp_path, fitted_to)
    with pytest.raises(ModelError, match="has 7 tokens, the base model 60"):
        load_direction(tmp_path, tiny_lm, tiny_tokenizer)
    facts = json.loads((tmp_path / FACTS_NAME).read_text())
    (tmp_path / FACTS_NAME).write_text(json.dumps(facts | {"kind": "other"}))
    with pytest.raises(ModelError, match="kind 'other'"):
        load_direction(tmp_path, tiny_lm, tiny_tokenizer)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        load_direction(tmp_path, tiny_lm, tiny_tokenizer)
    (tmp_path / FACTS_NAME).write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_direction(tmp_path, tiny_lm, tiny_tokenizer)


def test_a_causal_direction_asks_for_hidden_states(tiny_lm):
    bonus = causal_of(tiny_lm).begin([[1]], 1)
    with pytest.raises(ValueError, match="reads the reference's hidden state"):
        bonus(None, None, None)
