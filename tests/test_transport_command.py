"""transport as its users run it, on a tiny model: what the datasets hold, and that TRL's own trainers take them."""

import json

import pyarrow.parquet
import pytest

from reward_models.modelling import RewardModel
from vgf_llm import transport
from vgf_llm.data.trl import dpo_rows, sft_rows
from vgf_llm.errors import ConfigError, OutputError
from vgf_llm.runs.files import read_jsonl

WORDS = ("sea", "dog", "tree", "cat", "rain", "day")


@pytest.fixture
def folders(tmp_path, tiny_lm, tiny_tokenizer):
    base, reward, prompts = tmp_path / "base", tmp_path / "reward", tmp_path / "prompts.jsonl"
    tiny_lm.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean").save_pretrained(reward)
    prompts.write_text("".join(json.dumps({"prompt": f"write about the {word}"}) + "\n" for word in WORDS))
    return base, reward, prompts


@pytest.fixture
def argv(folders, tmp_path):
    base, reward, prompts = folders
    return [
        "--model_name_or_path", str(base), "--reward_model", str(reward), "--prompts", str(prompts), "--device", "cpu",
        "--max_new_tokens", "6", "--top_k", "10", "--num_particles", "4", "--batch_prompts", "2",
        "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip


def answered(**changes):
    row = {
        "response": "a good day",
        "value": 1.0,
        "source": "a bad day",
        "source_value": 0.0,
        "original_value": 0.5,
        "ended": True,
        "distance": {"nats": 0.7},
    }
    return {**row, **changes}


def test_datasets_are_conversational_under_a_chat_template(argv, tmp_path, capsys):
    assert transport.main(argv) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    sft = pyarrow.parquet.read_table(tmp_path / "run" / "sft.parquet").to_pylist()
    dpo = pyarrow.parquet.read_table(tmp_path / "run" / "dpo.parquet").to_pylist()
    assert counts["prompts"] == len(WORDS)
    assert counts["sft"] == len(sft) and counts["dpo"] == len(dpo) > 0
    assert counts["sft"] + sum(counts["sft_skipped"].values()) == len(WORDS)
    assert counts["dpo"] + sum(counts["dpo_skipped"].values()) == len(WORDS)
    answers = {row["prompt"]: row for row in read_jsonl(tmp_path / "run" / "rows.jsonl")}
    for row in dpo:
        assert set(row) == {"prompt", "chosen", "rejected", *transport_figures()}
        answer = answers[row["prompt"][0]["content"]]
        assert row["prompt"] == [{"role": "user", "content": answer["prompt"]}]
        assert row["chosen"] == [{"role": "assistant", "content": answer["response"]}]
        assert row["rejected"] == [{"role": "assistant", "content": answer["source"]}]
        assert row["value"] > row["source_value"] and row["nats"] > 0
    assert set(sft[0]) == {"prompt", "completion", *transport_figures()}


def transport_figures():
    return {"value", "source_value", "original_value", "nats", "ended"}


def test_datasets_are_text_without_a_chat_template(argv, folders, tiny_plain_tokenizer, tmp_path):
    tiny_plain_tokenizer.save_pretrained(folders[0])
    (folders[0] / "chat_template.jinja").unlink()
    folders[2].write_text(json.dumps({"prompt": [{"role": "user", "content": "write about the sea"}]}) + "\n")
    transport.main(argv)
    (row,) = pyarrow.parquet.read_table(tmp_path / "run" / "sft.parquet").to_pylist()
    assert row["prompt"] == "\n\nHuman: write about the sea\n\nAssistant:"
    assert isinstance(row["completion"], str)


def test_a_pair_without_a_gain_is_left_out_and_counted():
    answers = [
        answered(),
        answered(response="a bad day", value=0.0),
        answered(value=-0.5),
        answered(source=" "),
    ]
    pairs, skipped = dpo_rows(["p"] * 4, answers)
    assert [pair["chosen"] for pair in pairs] == ["a good day"] and pairs[0]["rejected"] == "a bad day"
    assert skipped == {"same": 1, "value_not_higher": 1, "empty": 1, "no_source": 0}
    rows, skipped = sft_rows(["p"] * 2, [answered(), answered(response="")])
    assert len(rows) == 1 and skipped == {"empty": 1}


def test_nothing_moved_leaves_no_pair_but_a_readable_file(argv, tmp_path, capsys):
    transport.main([*argv, "--budget.steps", "0"])
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["dpo_skipped"]["same"] == len(WORDS)
    assert "no pair is left" in captured.err
    table = pyarrow.parquet.read_table(tmp_path / "run" / "dpo.parquet")
    assert table.num_rows == 0 and table.column_names[:3] == ["prompt", "chosen", "rejected"]


def test_stopped_by_ctrl_c_it_goes_on_where_it_was(argv, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    transport.main([*argv, "--output_dir", str(whole)])
    real, calls = transport.append_jsonl, []

    def interrupted(path, rows):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rows)
        real(path, rows)

    monkeypatch.setattr(transport, "append_jsonl", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transport.main(argv)
    monkeypatch.setattr(transport, "append_jsonl", real)
    run = tmp_path / "run"
    assert len(read_jsonl(run / "rows.jsonl")) == 4 and not (run / "sft.parquet").exists()
    with pytest.raises(OutputError, match="--resume"):
        transport.main(argv)
    with pytest.raises(ConfigError, match="other settings .seed"):
        transport.main([*argv, "--resume", "--seed", "3"])
    transport.main([*argv, "--resume"])
    for name in ("sft.parquet", "dpo.parquet"):
        assert pyarrow.parquet.read_table(run / name).equals(pyarrow.parquet.read_table(whole / name))


def test_what_is_there_already_is_refused(argv, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dpo.parquet").write_text("mine")
    for flags in ([], ["--resume"]):
        with pytest.raises(OutputError, match=r"dpo.parquet exists"):
            transport.main([*argv, *flags])
    with pytest.raises(ConfigError, match="prompts is not set"):
        transport.main(argv[:4])


def test_trl_takes_a_step_on_both_files(argv, folders, tmp_path):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    transport.main(argv)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    for name, trainer_class, config_class in (("sft", SFTTrainer, SFTConfig), ("dpo", DPOTrainer, DPOConfig)):
        data = datasets.Dataset.from_parquet(str(tmp_path / "run" / f"{name}.parquet"), cache_dir=str(tmp_path / "hf"))
        model = AutoModelForCausalLM.from_pretrained(folders[0])
        before = model.get_input_embeddings().weight.detach().clone()
        arguments = config_class(
            output_dir=str(tmp_path / name), max_steps=1, learning_rate=0.1, per_device_train_batch_size=2,
            use_cpu=True, bf16=False, report_to=[], save_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trainer_class(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        assert not before.equal(trainer.model.get_input_embeddings().weight)
