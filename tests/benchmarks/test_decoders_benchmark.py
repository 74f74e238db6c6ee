"""The bake-off as its users run it, on a tiny model: both stages, resume, and a record that holds no texts."""

import json

import pytest

from benchmarks import decoders
from reward_models.card import RewardCard, write_card
from reward_models.modelling import RewardModel
from vgf_llm.errors import ConfigError


@pytest.fixture
def flags(tmp_path, tiny_lm, tiny_tokenizer, monkeypatch):
    base, reward, prompts = tmp_path / "base", tmp_path / "reward", tmp_path / "prompts.jsonl"
    tiny_lm.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean", input_skip=True).save_pretrained(reward)
    prompts.write_text("".join(json.dumps({"prompt": f"write about the {w}"}) + "\n" for w in ("sea", "dog", "tree")))
    monkeypatch.setattr(decoders, "_RECORDS", tmp_path)
    return [
        "--model_name_or_path", str(base), "--reward_model", str(reward), "--max_new_tokens", "6", "--top_k", "10",
        "--device", "cpu", "--prompts", str(prompts), "--output_dir", str(tmp_path / "run"), "--few_prompts", "2",
        "--main", "[prior]", "--others", "[prior, pivot]", "--extras", "[]", "--gold", "length_words",
    ]  # fmt: skip


@pytest.fixture
def card(flags, tiny_tokenizer):
    from vgf_llm.models.loading import fingerprint

    prints = fingerprint(tiny_tokenizer)
    folder = flags[flags.index("--reward_model") + 1]
    facts = {"pooling": "mean", "adapter": False, "chat_template": True, "max_length": 64, "train_pairs": 1}
    write_card(
        RewardCard(
            base_model="tiny",
            num_layers=1,
            tokenizer_sha256=prints.tokenizer,
            template_sha256=prints.template,
            held_out_pairs=1,
            score_std=0.5,
            **facts,
        ),
        folder,
    )


def test_both_stages_and_a_record_without_texts(flags, card, tmp_path, capsys):
    assert decoders.main([*flags, "--stage", "seconds"]) == 0
    timed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(timed["seconds"]) >= {"best-of-128", "prior @16", "pivot @128"}
    assert decoders.main([*flags, "--record", "tiny"]) == 0
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert headline["best-of-128"] == {"n": 128.0, "gold": 0.0}
    summary = json.loads((tmp_path / "tiny.json").read_text())
    assert summary["alpha"] == 0.05
    assert summary["arms"]["prior @16"]["prompts"] == 3 and summary["arms"]["pivot @16"]["prompts"] == 2
    assert summary["matched_seconds"]["prior @16"]["n"] >= 1
    text = (tmp_path / "tiny.md").read_text()
    assert "At equal FLOPs" in text and "At equal seconds" in text and "write about" not in text


def test_it_goes_on_where_it_stopped_and_shows_texts_where_it_may(flags, card, tmp_path, capsys):
    decoders.main(flags)
    rows = (tmp_path / "run" / "rows.jsonl").read_text()
    decoders.main([*flags, "--stage", "report", "--record", "tiny", "--show_texts", "true"])
    assert (tmp_path / "run" / "rows.jsonl").read_text() == rows
    text = (tmp_path / "tiny.md").read_text()
    assert "| 3 | write about the tree |" in text and text.count(" | write about ") == 3 * 8


def test_an_unknown_decoder_is_named(flags):
    with pytest.raises(ConfigError, match="'priors' is no decoder here"):
        decoders.main([*flags, "--main", "[priors]"])
