"""Prompts and preferences in the shapes people have them; every fault names file, row and column."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import build_tokenizer
from vgf_llm.data.prompts import (
    check_prompt_fits,
    encode_prompt,
    encode_response,
    load_preferences,
    load_prompts,
)
from vgf_llm.data.rows import read_rows
from vgf_llm.errors import DataError, ModelError

HH_FILE = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless_base_test_part.jsonl.gz"
GOOD = {"prompt": "the sea", "chosen": " is blue", "rejected": " is red"}


def write(path: Path, rows: list[dict]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_plain_and_packed(tmp_path, name):
    source = write(tmp_path / name, [{"prompt": "a dog"}, {"prompt": "a cat"}, {"prompt": "tea"}])
    assert load_prompts(source) == ["a dog", "a cat", "tea"]
    assert load_prompts(source, limit=2) == ["a dog", "a cat"]


def test_json_csv_txt_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": "a dog, old"}, {"q": 'a "cat"\nnew'}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with open(tmp_path / "rows.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["q"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.csv", "rows.parquet"):
        assert load_prompts(str(tmp_path / name), column="q") == [row["q"] for row in rows]
    (tmp_path / "prompts.txt").write_text("a dog\n\n  tea \n")
    assert load_prompts(str(tmp_path / "prompts.txt")) == ["a dog", "  tea "]


@pytest.mark.parametrize(
    "cell",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        json.dumps({"conversations": [{"from": "human", "value": "a"}]}),
        json.dumps(json.dumps([{"role": "user", "content": "a"}])),
    ],
)
def test_messages_in_an_object_or_in_json_twice(tmp_path, cell):
    assert load_prompts(write(tmp_path / "p.jsonl", [{"prompt": cell}])) == [[{"role": "user", "content": "a"}]]


@pytest.mark.parametrize("cell", ["a \ud83d b", [{"role": "user", "content": "a \ud83d b"}]])
def test_half_a_surrogate_pair_is_named(tmp_path, cell):
    source = write(tmp_path / "p.jsonl", [{"prompt": cell}])
    with pytest.raises(DataError, match=r"row 1, column 'prompt'.*: character 2 is half of a surrogate pair"):
        load_prompts(source)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(DataError, match="'/dev/null' is a pipe or device, not a file or folder"):
        load_prompts("/dev/null")
    with pytest.raises(DataError, match="is not a file or data set"):
        load_prompts("Write a sentence. " * 40)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "rows.csv").write_bytes("prompt\nhä\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"rows.csv' is not UTF-8 text .*; save it as UTF-8"):
        load_prompts(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "rows.jsonl, row 2: not JSON"),
        ("rows.jsonl", "[1, 2]\n", "row 1: expected a JSON object, got list"),
        ("rows.jsonl", "\n", "holds no rows"),
        ("rows.json", '[{"prompt": "a"}', "a file of one object per line is named .jsonl"),
        ("rows.json", '{"prompt": "a"}\n{"prompt": \n', "row 2: not JSON"),
        ("rows.json", '{"a": [{"prompt": "a"}], "b": [{"prompt": "a"}]}', "holds several lists of rows (a, b)"),
        ("rows.json", '{"prompt": {"0": "a"}, "chosen": {"0": "b"}}', "pandas: to_json(orient='records')"),
        ("rows.arrow", "not arrow", "cannot be read"),
        ("rows.json", '{"prompt": "a"}', "expected a list of objects, got dict"),
        ("rows.csv", "", "holds no rows"),
        (
            "rows.csv",
            "prompt,chosen\na,b\nHello, you,b\n",
            "row 2: 3 cells under 2 columns (prompt, chosen)",
        ),
        ("rows.tsv", "prompt\tprompt\na\tb\n", "the column 'prompt' stands twice in the first line"),
        ("rows.xlsx", "x", "unknown file type '.xlsx'; expected one of .jsonl"),
        ("rows.jsonl.gz", "not packed", "cannot be read"),
        ("rows.parquet", "not parquet", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load_prompts(str(tmp_path / name))
    assert expected in str(caught.value) and name in str(caught.value)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    for source in ("nowhere.jsonl", "./nowhere", str(tmp_path / "none.csv")):
        with pytest.raises(DataError, match="does not exist .current folder"):
            load_prompts(source)
    with pytest.raises(DataError, match="has no data files; their names end in .jsonl"):
        load_prompts(str(tmp_path))


def test_hub_names_and_their_failure(monkeypatch):
    import datasets

    asked = []

    def load(name, data_dir, split):
        asked.append((name, data_dir, split))
        if name == "owner/none":
            raise FileNotFoundError("no such dataset")
        return datasets.Dataset.from_list([{"prompt": "a dog"}, {"prompt": "a cat"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_prompts("owner/name", split="test", limit=1) == ["a dog"]
    assert load_prompts("owner/name/some/folder") == ["a dog", "a cat"]
    assert load_prompts("owner/name:validation", limit=1) == load_prompts("owner/name/part:test", limit=1) == ["a dog"]
    assert asked == [
        ("owner/name", None, "test"),
        ("owner/name", "some/folder", "train"),
        ("owner/name", None, "validation"),
        ("owner/name", "part", "test"),
    ]
    with pytest.raises(DataError, match="'owner/none' is not a local file and could not be loaded .* split 'train'"):
        load_prompts("owner/none")


def test_a_limit_below_one(tmp_path):
    source = write(tmp_path / "rows.jsonl", [GOOD])
    for limit in (0, -1):
        with pytest.raises(DataError, match=f"limit must be > 0, got {limit}; num_prompts"):
            read_rows(source, limit=limit)
        with pytest.raises(DataError, match="num_prompts"):
            load_prompts(source, limit=limit)


def test_row_numbers_are_lines_of_the_file_blank_ones_counted(tmp_path):
    good = json.dumps(GOOD) + "\n"
    (tmp_path / "rows.jsonl").write_text(good + "\n\n" + good + '{"prompt": ""}\n')
    assert [number for number, _ in read_rows(str(tmp_path / "rows.jsonl"))] == [1, 4, 5]
    with pytest.raises(DataError, match="row 5, column 'prompt': empty"):
        load_prompts(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="row 5: no column 'chosen'"):
        load_preferences(str(tmp_path / "rows.jsonl"))
    (tmp_path / "prompts.txt").write_text("\na dog\n\ntea\n")
    assert [number for number, _ in read_rows(str(tmp_path / "prompts.txt"))] == [2, 4]


# Prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "row 2: no column 'prompt'; columns: text"),
        ({"prompt": ""}, "row 2, column 'prompt': empty"),
        ({"prompt": " \n"}, "row 2, column 'prompt': empty"),
        ({"prompt": []}, "row 2, column 'prompt': empty"),
        ({"prompt": None}, "row 2, column 'prompt': expected text or messages, got None"),
        ({"prompt": 3}, "row 2, column 'prompt': expected text or messages, got 3"),
        ({"prompt": [user("a"), {"text": "b"}]}, "column 'prompt', message 1: expected an object with 'role'"),
        ({"prompt": [assistant("a")]}, "no message before the assistant's"),
    ],
)
def test_a_bad_prompt_names_file_row_and_column(tmp_path, row, expected):
    source = write(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(DataError) as caught:
        load_prompts(source)
    assert "rows.jsonl, " in str(caught.value) and expected in str(caught.value)


def test_a_whole_dialogue_is_cut_before_its_last_answer(tmp_path):
    rows = [
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"},
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")]},
    ]
    assert load_prompts(write(tmp_path / "rows.jsonl", rows), column="chosen") == [
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        [user("a"), assistant("b"), user("c")],
    ]


# Preferences -------------------------------------------------------------------------------------------------------


def test_encode_with_a_chat_template():
    tokenizer = build_tokenizer()
    word = tokenizer.convert_tokens_to_ids
    assert encode_prompt(tokenizer, "a dog") == [word(token) for token in ("<user>", "a", "dog", "<assistant>")]
    dialogue = "\n\nHuman: tea\n\nAssistant: old tea\n\nHuman: the sea\n\nAssistant:"
    messages = [user("tea"), assistant("old tea"), user("the sea")]
    expected = "<user> tea <assistant> old tea <eos> <user> the sea <assistant>".split()
    assert (
        encode_prompt(tokenizer, dialogue) == encode_prompt(tokenizer, messages) == [word(token) for token in expected]
    )


def test_encode_without_a_chat_template():
    tokenizer = build_tokenizer(chat=False)
    word = tokenizer.convert_tokens_to_ids
    assert encode_prompt(tokenizer, "a dog") == [word("a"), word("dog")]
    dialogue = "\n\nHuman: tea\n\nAssistant: old tea\n\nHuman: the sea\n\nAssistant:"
    messages = [user("tea"), assistant("old tea"), user("the sea")]
    assert encode_prompt(tokenizer, messages) == encode_prompt(tokenizer, dialogue)


def test_a_template_that_refuses_and_a_prompt_of_no_tokens():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses .* roles must alternate"):
        encode_prompt(tokenizer, [user("a"), user("b")])
    with pytest.raises(DataError, match="has no tokens"):
        encode_prompt(build_tokenizer(chat=False), " ")


def test_encode_response_and_a_tokenizer_without_eos():
    tokenizer = build_tokenizer()
    red = tokenizer.convert_tokens_to_ids("red")
    assert encode_response(tokenizer, " red", eos=False) == [red]
    assert encode_response(tokenizer, " red", eos=True) == [red, tokenizer.eos_token_id]
    tokenizer.eos_token = None
    assert encode_response(tokenizer, "red", eos=False) == [red]
    with pytest.raises(ModelError, match="no EOS token"):
        encode_response(tokenizer, "red", eos=True)


def test_a_prompt_longer_than_the_model():
    check_prompt_fits([1] * 8, 12, 4, index=0)
    check_prompt_fits([1] * 800, None, 4, index=0)
    with pytest.raises(DataError, match="prompt 7: 9 tokens and up to 4 new ones exceed the model's 12 positions"):
        check_prompt_fits([1] * 9, 12, 4, index=7)
    check_prompt_fits([1] * 7, 12, 4, index=7, reserved=1)
    with pytest.raises(DataError, match="12 positions less the 1 that an engine needs to read; shorten it to 7 tokens"):
        check_prompt_fits([1] * 8, 12, 4, index=7, reserved=1)


@pytest.mark.parametrize("option", ["margin_column", "system_column", "preference_column"])
def test_an_optional_column_that_is_named_must_be_there(tmp_path, option):
    source = write(tmp_path / "pairs.jsonl", [GOOD])
    assert len(load_preferences(source).pairs) == 1
    said = f"no row has the column 'nothing-there' that --{option} names; columns: prompt, chosen, rejected"
    with pytest.raises(DataError, match=said):
        load_preferences(source, **{option: "nothing-there"})


def test_a_system_turn_beside_another_is_refused(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [system, user("a")], "system": " Be brief. "}, {"prompt": "b", "system": ""}]
    assert load_prompts(write(tmp_path / "p.jsonl", rows)) == [[system, user("a")], "b"]
    with pytest.raises(DataError, match="row 1: the prompt starts with the system turn 'Be brief.', and column 'sys"):
        load_prompts(write(tmp_path / "q.jsonl", [{**rows[0], "system": "Be long."}]))
    with pytest.raises(DataError, match="row 1, column 'system': expected the text of a system turn, got 3"):
        load_prompts(write(tmp_path / "r.jsonl", [{"prompt": "b", "system": 3}]))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_that_is_nested_too_deeply_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": ' + "[" * 200_000 + "\n")
    with pytest.raises(DataError, match=f"{name}.*not JSON"):
        load_prompts(str(tmp_path / name))
