"""Conversations are read by their turns, and nothing that scores them sees less than all of it."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from reward_models.composed import Remembered
from reward_models.foreign import ForeignReward
from reward_models.functions import call_function
from reward_models.inputs import check_rewards
from reward_models.logged import load_logged
from reward_models.modelling import RewardModel
from tests.byte_tokenizers import byte_tokenizer
from tests.conftest import build_llama, build_tokenizer
from vgf_llm.data.dialogue import PromptText, as_messages, as_text, conversation_text, turns_of
from vgf_llm.data.encoding import encode_prompt
from vgf_llm.data.prompts import load_preferences, load_prompt_texts, load_prompts
from vgf_llm.errors import ConfigError, DataError

CLOSED = "\n\nHuman: Name a river.\n\nAssistant: The Danube."
OPEN = CLOSED + "\n\nHuman: And a lake?"
TALK = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Danube."},
    {"role": "user", "content": "And a lake?"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (OPEN, OPEN + "\n\nAssistant:"),
        (OPEN + "\n", OPEN + "\n\nAssistant:"),
        (OPEN + "\n\nAssistant:", OPEN + "\n\nAssistant:"),
        (OPEN + "\n\nAssistant: Lake Constance.", OPEN + "\n\nAssistant:"),
        ("\n\nHuman: What does '\n\nAssistant:' mean?", "\n\nHuman: What does '\n\nAssistant:' mean?\n\nAssistant:"),
        ("What does \n\nAssistant: mean?", "What does \n\nAssistant: mean?"),
    ],
)
def test_an_open_dialogue_keeps_its_last_question(tmp_path, text, prompt):
    assert load_prompts(write(tmp_path / "p.jsonl", [{"prompt": text}])) == [prompt]


@pytest.mark.parametrize("chat", [True, False])
def test_text_and_messages_of_one_conversation_encode_alike(tmp_path, chat):
    tokenizer = build_tokenizer(chat)
    rows = [
        {"prompt": OPEN, "chosen": " a", "rejected": " b"},
        {"prompt": OPEN + "\n\nAssistant:", "chosen": "a", "rejected": "b"},
        {"prompt": TALK, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": TALK, "chosen": [*TALK, assistant("a")], "rejected": [*TALK, assistant("b")]},
    ]
    pairs = load_preferences(write(tmp_path / "pairs.jsonl", rows)).pairs
    (prompt,) = load_prompts(write(tmp_path / "p.jsonl", rows[:1]))
    encoded = [encode_prompt(tokenizer, one) for one in (prompt, OPEN, TALK, *(pair.prompt for pair in pairs))]
    assert all(one == encoded[0] for one in encoded)


def test_turns_and_texts():
    assert [(turn.role, turn.text) for turn in turns_of(CLOSED)] == [
        ("user", " Name a river."),
        ("assistant", " The Danube."),
    ]
    assert as_messages(OPEN) == TALK and as_text(TALK) == as_text(OPEN) == OPEN + "\n\nAssistant:"
    assert conversation_text([user("Hi")]) == "Hi"
    assert conversation_text([{"role": "system", "content": "Be brief."}, user("Hi")]) == (
        "Be brief.\n\nHuman: Hi\n\nAssistant:"
    )
    with pytest.raises(DataError, match="message 1 has the role 'tool', which has no place in a Human/Assistant text"):
        as_text([user("a"), {"role": "tool", "content": "1"}])


@pytest.mark.parametrize(
    "head",
    [
        "Human: Hi.\n\nAssistant:",
        "\nHuman: Hi.\n\nAssistant:",
        "\n\n\nHuman: Hi.\n\n\nAssistant:",
        "\r\n\r\nHuman: Hi.\r\n\r\nAssistant:",
        "\n\n Human: Hi.\n \n Assistant :",
        "Human: Hi.\nAssistant:",
    ],
)
def test_a_dialogue_may_be_spaced_otherwise(tmp_path, head):
    row = {"chosen": head + " The sea is wet.", "rejected": head + " The sea is dry."}
    (pair,) = load_preferences(write(tmp_path / "pairs.jsonl", [row])).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (head, " The sea is wet.", " The sea is dry.")
    assert as_messages(pair.prompt) == [user("Hi.")]
    assert load_prompts(write(tmp_path / "p.jsonl", [row]), column="chosen") == [head]


@pytest.mark.parametrize(
    "text", ["Human: a short story.", "Human rights?\n\nAssistant: none", "Assistant: a\n\nHuman: b"]
)
def test_what_only_looks_like_a_dialogue_is_text(text):
    assert turns_of(text) == []


@pytest.mark.parametrize(
    "head",
    [
        "### Instruction:\nHi.\n\n### Response:\n",
        "Be brief.\n\nUser: Hi.\n\nAssistant:",
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n",
        "<start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\n",
        "<s>[INST] Hi. [/INST]",
        "<|user|>\nHi.<|end|>\n<|assistant|>\n",
    ],
)
def test_answers_of_an_implicit_prompt_may_start_alike(tmp_path, head):
    row = {"chosen": head + " The sea is wet.", "rejected": head + " The sea is dry."}
    (pair,) = load_preferences(write(tmp_path / "pairs.jsonl", [row])).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (head, " The sea is wet.", " The sea is dry.")


@pytest.mark.parametrize("prompt", ["Hi.", [user("Hi.")]])
def test_responses_that_hold_a_templated_prompt_lose_it(tmp_path, prompt):
    head = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": prompt, "chosen": head + "Yes.<|im_end|>\n", "rejected": head + "No.<|im_end|>\n"}
    (pair,) = load_preferences(write(tmp_path / "pairs.jsonl", [row])).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (head, "Yes.<|im_end|>\n", "No.<|im_end|>\n")
    row |= {"prompt": "What does it mean?"}  # the marks belong to the answers
    (pair,) = load_preferences(write(tmp_path / "pairs.jsonl", [row])).pairs
    assert (pair.prompt, pair.chosen) == ("What does it mean?", row["chosen"])


def test_the_users_turn_is_never_a_response(tmp_path):
    thanks = {
        "chosen": [user("a"), assistant("b"), user("Thanks, perfect!")],
        "rejected": [user("a"), assistant("That is wrong.")],
    }
    alone = {"prompt": "a", "chosen": [user("b")], "rejected": [assistant("c")]}
    text = {"chosen": OPEN, "rejected": CLOSED.replace("Danube", "Rhine")}
    good = {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}
    reason = "whose last turn is not the assistant's"
    found = load_preferences(write(tmp_path / "a.jsonl", [good] * 9 + [alone]))
    assert len(found.pairs) == 9 and found.dropped[reason] == 1
    for bad in (thanks, text):
        with pytest.raises(DataError, match=f"1 of 1 rows are unusable.*1 {reason}"):
            load_preferences(write(tmp_path / "b.jsonl", [bad]))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"chosen": [user("z"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "that share no prompt"),
        (
            {
                "chosen": [{"role": "system", "content": "s"}, user("a"), assistant("b")],
                "rejected": [{"role": "system", "content": "t"}, user("a"), assistant("c")],
            },
            "that share no prompt",
        ),
        ({"chosen": None, "rejected": [user("a"), assistant("c")]}, "with an empty response"),
        ({"chosen": "", "rejected": [user("a"), assistant("c")]}, "with an empty response"),
        ({"chosen": [user("a"), assistant(None)], "rejected": [user("a"), assistant("c")]}, "with an empty response"),
    ],
)
def test_one_odd_row_is_counted(tmp_path, odd, reason):
    good = {"chosen": [user("a"), assistant("b")], "rejected": [user("a "), assistant("c")]}
    found = load_preferences(write(tmp_path / "pairs.jsonl", [good] * 9 + [odd]))
    assert len(found.pairs) == 9 and found.dropped[reason] == 1
    assert found.pairs[0].prompt == [user("a")]
    with pytest.raises(DataError, match=f"10 of 10 rows are unusable.*10 {reason} .first: row 1"):
        load_preferences(write(tmp_path / "all.jsonl", [odd] * 10))


def test_a_stated_prompt_that_ends_in_an_answer_is_counted(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    odd = {"prompt": CLOSED, "chosen": " Yes.", "rejected": " No."}
    found = load_preferences(write(tmp_path / "pairs.jsonl", [good] * 9 + [odd]))
    assert found.dropped["whose prompt ends in the assistant's turn"] == 1


# What scores a conversation ----------------------------------------------------------------------------------------


def test_a_reward_model_of_another_tokenizer_reads_the_whole_conversation():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    base = build_llama(tied=False)
    base.resize_token_embeddings(len(tokenizer))
    model = RewardModel.from_base(base).eval()
    torch.nn.init.normal_(model.head.weight)
    reward = ForeignReward(model, tokenizer)
    system = {"role": "system", "content": "Be brief."}
    talk = [system, user("A"), assistant("B"), user("No, one more.")]
    other = [user("C"), assistant("D"), user("No, one more.")]
    scores = reward([PromptText(talk), PromptText(other), PromptText("No, one more.")], ["Yes."] * 3)
    assert len({round(score, 4) for score in scores}) == 3
    ids = encode_prompt(tokenizer, talk)
    answer = tokenizer("Yes.<|im_end|>", add_special_tokens=False)["input_ids"]
    alone = model.score(model.prefix([ids]), torch.tensor([[answer]]), torch.ones(1, 1, len(answer)).bool())
    assert scores[0] == pytest.approx(float(alone), abs=1e-5)
    dialogue = "\n\nHuman: C\n\nAssistant: D\n\nHuman: No, one more.\n\nAssistant:"
    assert reward([dialogue], ["Yes."])[0] == pytest.approx(scores[1], abs=1e-5)
    with pytest.raises(DataError, match="has .* tokens in its own tokenizer and chat template, and the model 128 pos"):
        call_function(reward, ["word " * 200], ["Yes."])


def answer_matches(prompts, responses, answer):
    return [float(response == right) for response, right in zip(responses, answer, strict=True)]


def everything(prompts, responses, **columns):
    return [float(len(columns)) for _ in responses]


def test_functions_read_the_conversation_and_the_columns_that_they_take(tmp_path):
    rows = [{"prompt": TALK, "answer": "4", "level": 2}, {"prompt": "2 + 2?", "answer": "5", "level": 1}]
    prompts = load_prompt_texts(write(tmp_path / "p.jsonl", rows))
    assert prompts == [OPEN + "\n\nAssistant:", "2 + 2?"] and prompts[0].prompt == TALK
    assert dict(prompts[1].columns) == {"answer": "5", "level": 1}
    kept = pickle.loads(pickle.dumps(prompts))
    assert kept == prompts and kept[0].prompt == TALK and kept[1].columns == prompts[1].columns
    assert call_function(answer_matches, prompts, ["4", "4"]) == [1.0, 0.0]
    assert call_function(everything, prompts, ["4", "4"]) == [2.0, 2.0]
    assert call_function(lambda p, r: [len(one) for one in p], prompts, ["", ""]) == [len(prompts[0]), 6.0]
    twice = [prompts[1], PromptText("2 + 2?", {"answer": "4"})]
    assert Remembered(answer_matches)(twice, ["4", "4"]) == [0.0, 1.0]  # one text, two right answers
    with pytest.raises(ConfigError, match="answer_matches takes 'answer', and .* no such column; columns: none"):
        call_function(answer_matches, ["2 + 2?"], ["4"])
    name = f"{__name__}:answer_matches"
    check_rewards([name], prompts=prompts)
    with pytest.raises(ConfigError, match="columns: level"):
        check_rewards([name], prompts=[PromptText("a", {"level": 1})])


# Prompts that are repeated -----------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_prompt_that_responses_repeat_is_cut_off_where_the_file_is_written_so(tmp_path):
    repeats = [pair(f"What is {n}?", f"What is {n}? It is {n}.", f"What is {n}? No.") for n in range(9)]
    plain = pair("Say hi.", "Hi.", "No.")
    found = load_preferences(write(tmp_path / "most.jsonl", [*repeats, plain]))
    assert [one.chosen for one in found.pairs] == [f" It is {n}." for n in range(9)] + ["Hi."]
    assert "9 pairs repeated their prompt, which was cut off" in found.report()
    few = load_preferences(write(tmp_path / "few.jsonl", [repeats[0], *[plain] * 9]))
    assert few.pairs[0].chosen == "What is 0? It is 0." and few.repeated == 0
    with pytest.raises(DataError, match="responses start with their prompt in 3 of 4 rows .first: row 1."):
        load_preferences(write(tmp_path / "some.jsonl", [*repeats[:3], plain]))
    echo = load_preferences(write(tmp_path / "echo.jsonl", [pair("Hi", "Hit it.", "Hint.")]))
    assert echo.pairs[0].chosen == "Hit it."


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("Name a river.", TALK), ([user("Name a river.")], TALK), (TALK, TALK)],
)
def test_logged_responses_bring_the_turns_before_them(tmp_path, prompt, read):
    row = {"prompt": prompt, "response": [*TALK, assistant("Lake Constance.")], "reward": 1}
    (found,) = load_logged(write(tmp_path / "logged.jsonl", [row]))
    assert (found.prompt, found.response) == (read, "Lake Constance.")
    row["prompt"] = "Another question?"
    with pytest.raises(DataError, match=r"row 1, column 'response': whose prompt is not part of the turns"):
        load_logged(write(tmp_path / "logged.jsonl", [row]))


@pytest.mark.parametrize("prompt", [CLOSED, [user("Name a river."), assistant("The Danube.")]])
def test_a_logged_prompt_that_is_answered_is_refused(tmp_path, prompt):
    row = {"prompt": prompt, "response": "The Rhine.", "reward": 1}
    with pytest.raises(
        DataError, match=r"row 1, column 'prompt': the prompt ends in the assistant's turn 'The Danube.'"
    ):
        load_logged(write(tmp_path / "logged.jsonl", [row]))


def test_logged_responses_that_repeat_their_prompt(tmp_path):
    rows = [{"prompt": "2 + 2?", "response": "2 + 2? 4", "reward": 1}, {"prompt": "a", "response": "a b", "reward": 0}]
    assert [one.response for one in load_logged(write(tmp_path / "r.jsonl", rows))] == [" 4", " b"]
    with pytest.raises(DataError, match="row 1, column 'response': expected text or messages, got None"):
        load_logged(write(tmp_path / "n.jsonl", [{"prompt": "a", "response": None, "reward": 0}]))


@pytest.mark.parametrize("prompt", ["Q?", "\n\nHuman: Q?", "\n\nHuman: Q?\n\nAssistant:", [user("Q?")]])
def test_dialogues_that_repeat_a_stated_prompt(tmp_path, prompt):
    whole = "\n\nHuman: Q?\n\nAssistant:"
    rows = [pair(prompt, f"{whole} Yes.", f"{whole} No.")] * 2
    found = load_preferences(write(tmp_path / "pairs.jsonl", rows)).pairs[0]
    assert (as_messages(found.prompt), found.chosen, found.rejected) == ([user("Q?")], " Yes.", " No.")


def test_a_template_s_text_without_a_stated_prompt_is_cut_where_the_answer_begins(tmp_path):
    tokenizer = byte_tokenizer()
    both = [
        tokenizer.apply_chat_template([user("Hi"), assistant(text)], tokenize=False)
        for text in ("The sea is blue.", "The sea is red.")
    ]
    (found,) = load_preferences(write(tmp_path / "p.jsonl", [{"chosen": both[0], "rejected": both[1]}])).pairs
    assert found.chosen == "The sea is blue.<|im_end|>\n"
    assert encode_prompt(tokenizer, found.prompt) == encode_prompt(tokenizer, [user("Hi")])


def test_a_logged_dialogue_is_its_last_answer(tmp_path):
    row = {"prompt": "\n\nHuman: Q?", "response": "\n\nHuman: Q?\n\nAssistant: Yes.", "reward": 1}
    (found,) = load_logged(write(tmp_path / "r.jsonl", [row]))
    assert found.prompt == "\n\nHuman: Q?\n\nAssistant:" and found.response == " Yes."
    with pytest.raises(DataError, match="the last message must be the assistant's, got 'user'"):
        load_logged(write(tmp_path / "u.jsonl", [{**row, "response": OPEN}]))
