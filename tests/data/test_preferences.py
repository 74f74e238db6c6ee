"""Preference data: shapes of a pair, what is counted as unusable, what is refused and by which name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from vgf_llm.data.prompts import (
    PreferencePair,
    load_preferences,
    load_prompts,
)
from vgf_llm.errors import DataError

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


HH_PROMPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: tea?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (GOOD, PreferencePair("the sea", " is blue", " is red")),
        ({**GOOD, "margin": 0.5}, PreferencePair("the sea", " is blue", " is red", 0.5)),
        ({**GOOD, "prompt": [user("a")]}, PreferencePair([user("a")], " is blue", " is red")),
        (
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            PreferencePair([user("a")], "b", "c"),
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            PreferencePair([user("a")], "b", "c"),
        ),
        (  # the prompt is stated and repeated inside both
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            PreferencePair("a", "b", "c"),
        ),
        (
            {"chosen": HH_PROMPT + " Yes, please.", "rejected": HH_PROMPT + " Yes, no."},
            PreferencePair(HH_PROMPT, " Yes, please.", " Yes, no."),
        ),
    ],
    ids=["explicit", "margin", "message prompt", "messages", "implicit messages", "repeated prompt", "dialogue"],
)
def test_shapes_of_preference_data(tmp_path, row, pair):
    preferences = load_preferences(write(tmp_path / "pairs.jsonl", [row]))
    assert preferences.pairs == [pair]


def test_unusable_rows_are_counted_and_reported(tmp_path):
    rows = [GOOD] * 12 + [{**GOOD, "chosen": " is red"}, {**GOOD, "rejected": " "}]
    preferences = load_preferences(write(tmp_path / "pairs.jsonl", rows))
    assert len(preferences.pairs) == 12 and preferences.rows == 14
    report = preferences.report()
    assert "14 rows, 12 pairs kept, dropped: 1 with chosen == rejected, 1 with an empty response" in report


def test_too_many_unusable_rows_are_refused(tmp_path):
    source = write(tmp_path / "pairs.jsonl", [GOOD] * 2 + [{**GOOD, "chosen": " is red"}] * 2)
    with pytest.raises(DataError) as caught:
        load_preferences(source)
    assert "2 of 4 rows are unusable" in str(caught.value)
    assert "2 with chosen == rejected (first: row 3)" in str(caught.value)
    assert len(load_preferences(source, max_dropped_share=0.5).pairs) == 2
    with pytest.raises(DataError, match="1 of 1 rows are unusable"):
        load_preferences(write(tmp_path / "none.jsonl", [{**GOOD, "rejected": ""}]), max_dropped_share=1.0)


@pytest.mark.parametrize(
    "row",
    [
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: e",
        },
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("e")]},
    ],
)
def test_pairs_that_diverge_before_the_last_turn_are_counted(tmp_path, row):
    same = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    preferences = load_preferences(write(tmp_path / "pairs.jsonl", [same] * 9 + [row]))
    assert len(preferences.pairs) == 9 and preferences.dropped["that diverge before the last turn"] == 1


TALK = [user("a"), assistant("b"), user("c")]


@pytest.mark.parametrize(
    ("prompt", "shared", "joined"),
    [
        ("a", TALK, TALK),
        ([user("a")], TALK, TALK),
        ("c", TALK, TALK),
        (TALK, TALK, TALK),
        ("a", [{"role": "system", "content": "s"}, user("a")], [{"role": "system", "content": "s"}, user("a")]),
        ("a", TALK[1:], TALK),
        ("a ", [user("a")], "a "),
    ],
)
def test_shared_turns_beyond_the_stated_prompt_are_kept(tmp_path, prompt, shared, joined):
    row = {"prompt": prompt, "chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e")]}
    assert load_preferences(write(tmp_path / "pairs.jsonl", [row])).pairs == [PreferencePair(joined, "d", "e")]


def test_a_stated_prompt_that_the_shared_turns_contradict_is_refused(tmp_path):
    row = {"prompt": "z", "chosen": [*TALK, assistant("d")], "rejected": [*TALK, assistant("e")]}
    with pytest.raises(DataError, match="row 1: the prompt 'z' is not part of the 3 turns"):
        load_preferences(write(tmp_path / "pairs.jsonl", [row]))


def test_a_prompt_column_that_some_rows_have_must_be_in_all(tmp_path):
    whole = {"chosen": HH_PROMPT + " Yes.", "rejected": HH_PROMPT + " No."}
    for rows, missing in (([whole, GOOD], 1), ([GOOD, whole], 2)):
        with pytest.raises(DataError, match=f"row {missing}: no column 'prompt'"):
            load_preferences(write(tmp_path / "pairs.jsonl", rows))


def test_identical_dialogues_are_identical_responses(tmp_path):
    dialogue = HH_PROMPT + " Yes."
    rows = [{"chosen": HH_PROMPT + " Yes.", "rejected": HH_PROMPT + " No."}] * 9
    messages = [user("a"), assistant("b")]
    rows += [{"chosen": dialogue, "rejected": dialogue}, {"chosen": messages, "rejected": messages}]
    assert load_preferences(write(tmp_path / "pairs.jsonl", rows)).dropped["with chosen == rejected"] == 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 2: no column 'rejected'; columns: prompt, chosen"),
        (
            {**GOOD, "prompt": ""},
            "more than the allowed share of 0.2: 1 with an empty prompt (first: row 2)",
        ),
        ({"chosen": "b", "rejected": "c"}, "row 2: no column 'prompt'"),
        (
            {**GOOD, "chosen": None},
            "more than the allowed share of 0.2: 1 with an empty response (first: row 2)",
        ),
        ({**GOOD, "chosen": 3}, "row 2, column 'chosen': expected text or messages, got 3"),
        ({**GOOD, "chosen": [assistant("b")]}, "row 2: one of chosen and rejected is text and the other"),
        ({**GOOD, "margin": "much"}, "row 2, column 'margin': expected a number, got 'much'"),
        ({**GOOD, "margin": "nan"}, "row 2, column 'margin': expected a number, got 'nan'"),
    ],
)
def test_a_bad_pair_names_file_row_and_column(tmp_path, row, expected):
    with pytest.raises(DataError) as caught:
        load_preferences(write(tmp_path / "pairs.jsonl", [GOOD, row]))
    assert "pairs.jsonl" in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": "b", "rejected": "c"}, "1 that share no prompt .first: row 1: chosen starts 'b', rejected 'c'"),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "1 that share no prompt .* with --prompt_column"),
        (
            {"question": "a b?", "chosen": "b", "rejected": "c"},
            "columns: question, chosen, rejected; name ano",
        ),
    ],
)
def test_no_prompt_to_be_found(tmp_path, row, expected):
    with pytest.raises(DataError, match=expected):
        load_preferences(write(tmp_path / "pairs.jsonl", [row]))


def test_harmless_base_from_anthropic():
    if not HH_FILE.exists():
        pytest.skip(f"{HH_FILE} is not here; it is not part of the repository")
    preferences = load_preferences(str(HH_FILE))
    assert preferences.rows == 1825 and len(preferences.pairs) == 1817
    assert preferences.dropped["with an empty response"] == 3
    for pair in preferences.pairs:
        assert pair.prompt.startswith("\n\nHuman:") and pair.prompt.endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in pair.chosen + pair.rejected
    prompts = load_prompts(str(HH_FILE), column="chosen")
    agreeing = sum(pair.prompt in prompts for pair in preferences.pairs)
    assert len(prompts) == 1825 and agreeing == 1817


# Encoding ----------------------------------------------------------------------------------------------------------


# Objectives --------------------------------------------------------------------------------------------------------


def test_differences_of_one_column_or_two_and_null_or_0_is_no_opinion(tmp_path):
    columns = {"helpful": "chosen-rating - rejected-rating", "brief": "brevity"}
    rows = [
        {"chosen-rating": 4.5, "rejected-rating": 3, "brevity": -2},
        {"chosen-rating": None, "rejected-rating": 3, "brevity": 0.5},
        {"chosen-rating": "4", "rejected-rating": "4", "brevity": "1"},
        {"chosen-rating": 1, "rejected-rating": 2},
        {"chosen-rating": 1, "rejected-rating": 1, "brevity": 0},
    ]
    source = write(tmp_path / "pairs.jsonl", [{**GOOD, **row} for row in rows])
    found = load_preferences(source, objectives=columns)
    assert [pair.differences for pair in found.pairs] == [(1.5, -2.0), (0.0, 0.5), (0.0, 1.0), (-1.0, 0.0)]
    assert "1 without an opinion on any objective" in found.report()
    assert [pair.differences for pair in load_preferences(source).pairs] == [()] * 5
    (pair, *_) = load_preferences(source, margin_column="chosen-rating-rejected-rating").pairs
    assert pair.margin == 1.5


def test_differences_trade_sides_with_the_responses(tmp_path):
    """An overall preference above 0 says that the response in rejected_column is the better one."""
    row = {**GOOD, "overall_preference": 2, "longer": 3}
    (pair,) = load_preferences(write(tmp_path / "pairs.jsonl", [row]), objectives={"long": "longer"}).pairs
    assert (pair.chosen, pair.rejected, pair.differences) == (" is red", " is blue", (-3.0,))


def test_the_overall_preference_keeps_its_sign_as_an_objective(tmp_path):
    """Below 0 the response in chosen_column is better, so the better response is better by |preference|."""
    rows = [{**GOOD, "overall_preference": -2}, {**GOOD, "overall_preference": 3}]
    found = load_preferences(write(tmp_path / "a.jsonl", rows), objectives={"overall": "overall_preference"}).pairs
    assert [(pair.chosen, pair.differences) for pair in found] == [(" is blue", (2.0,)), (" is red", (3.0,))]
    rows = [{**GOOD, "preference_strength": -1, "longer": 2}]
    given = {"preference_column": "preference_strength", "objectives": {"better": "preference_strength", "l": "longer"}}
    (pair,) = load_preferences(write(tmp_path / "b.jsonl", rows), **given).pairs
    assert (pair.chosen, pair.differences) == (" is blue", (1.0, 2.0))


def test_objectives_of_a_row_without_an_overall_preference_are_kept(tmp_path):
    row = {**GOOD, "overall_preference": 0, "longer": -3}
    (pair,) = load_preferences(write(tmp_path / "pairs.jsonl", [row]), objectives={"long": "longer"}).pairs
    assert (pair.chosen, pair.margin, pair.differences) == (" is blue", None, (-3.0,))


def test_ties_and_missing_ratings_are_counted_and_never_too_many(tmp_path):
    seen = [1, 0, None, "N/A", "nan", float("nan"), " "]
    rows = [{**GOOD, "left": value, "right": 0} for value in seen]
    found = load_preferences(write(tmp_path / "pairs.jsonl", rows), objectives={"a": "left-right"}, max_dropped_share=0)
    assert [pair.differences for pair in found.pairs] == [(1.0,)]
    assert "7 rows, 1 pairs kept" in found.report() and "6 without an opinion on any objective" in found.report()
    with pytest.raises(DataError, match="column 'left': expected a number, got 'N/A'"):
        load_preferences(write(tmp_path / "margins.jsonl", rows[3:4]), margin_column="left-right")


@pytest.mark.parametrize(
    ("row", "column", "said"),
    [
        ({"a": 1}, "b", "no row has the column 'b' that --objectives names; columns: prompt, chosen, rejected, a"),
        ({"a": 1}, "a-b", "no row has the column 'a-b' that --objectives names"),
        ({"a": 0}, "a", "no row has an opinion on the objective 'name': column 'a' is null or 0 in all 2;"),
        ({"a": 2, "b": 2}, "a - b", "no row has an opinion on the objective 'name': column 'a - b' is null or 0"),
        ({"a": "much"}, "a", "row 1, column 'a': expected a number, got 'much'"),
    ],
)
def test_objectives_that_say_nothing_are_named(tmp_path, row, column, said):
    with pytest.raises(DataError, match=said):
        load_preferences(write(tmp_path / "pairs.jsonl", [{**GOOD, **row}] * 2), objectives={"name": column})
