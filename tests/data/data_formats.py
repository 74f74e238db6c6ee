"""The formats of docs/data.md, each with a file that has it and what comes of it.

`python -m tests.data.data_formats` prints the table.

A reading is one of: a list of what was read, under the options that read it; the text of a refusal; or "" for a format
that has nothing of the kind. Pairs are (prompt, chosen, rejected, margin), values (prompt, response, reward).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data.format_files import arrow, jsonl, parquet, saved, separated, shards, text

Q, GOOD, BAD = "What is the sea?", "It is water.", "It is sand."
TALK_TEXT = f"Be brief.\n\nHuman: {Q}\n\nAssistant:"
HH = f"\n\nHuman: {Q}\n\nAssistant:"
MANY = f"\n\nHuman: Hello.\n\nAssistant: Hello!\n\nHuman: {Q}\n\nAssistant:"


@dataclass(frozen=True)
class Read:
    """What is read, and the options that it takes."""

    found: list[Any]
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """One line of the table: how a file looks, and what each kind of command makes of it."""

    name: str
    write: Callable[[Path], str]
    pairs: Read | str = ""
    prompts: Read | str = ""
    values: Read | str = ""


def user(text: Any) -> dict:
    return {"role": "user", "content": text}


def bot(text: Any) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [user("Hello."), bot("Hello!"), user(Q)]


def numpy_print(value: Any) -> str:
    """What pandas writes into a CSV file for a parquet file's list of structs."""
    return value if isinstance(value, str) else "[" + "\n ".join(repr(one) for one in value) + "]"


def cells() -> dict:
    return {"prompt": [user(Q)], "chosen": [bot(GOOD)], "rejected": [bot(BAD)]}


PLAIN = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
PAIR = [(Q, GOOD, BAD, None)]
SYSTEM_PAIR = [(TALK_TEXT, GOOD, BAD, None)]
MANY_PAIR = [(MANY, GOOD, BAD, None)]
BOTH = [(Q, GOOD, 3.0), (Q, BAD, 3.0)]
COLUMN = "no column 'chosen'; columns:"

FORMATS = [
    Format("TRL prompt-only, text", jsonl({"prompt": Q}), COLUMN, Read([Q]), "no column 'response'"),
    Format("TRL prompt-only, messages", jsonl({"prompt": [SYSTEM, user(Q)]}), COLUMN, Read([TALK_TEXT])),
    Format("TRL preference, explicit prompt, text", jsonl(PLAIN), Read(PAIR), Read([Q]), Read(BOTH)),
    Format("TRL preference, explicit prompt, messages", jsonl(cells()), Read(PAIR), Read([Q]), Read(BOTH)),
    Format(
        "TRL preference, implicit prompt, messages (Skywork)",
        jsonl({"chosen": [SYSTEM, user(Q), bot(GOOD)], "rejected": [SYSTEM, user(Q), bot(BAD)]}),
        Read(SYSTEM_PAIR),
        Read([TALK_TEXT], {"prompt_column": "chosen"}),
        Read([(TALK_TEXT, GOOD, 3.0), (TALK_TEXT, BAD, 3.0)]),
    ),
    Format(
        "TRL preference, implicit prompt, text: the first words that both share",
        jsonl({"chosen": "The sea is blue.", "rejected": "The sea is bright green."}),
        Read([("The sea is", "blue.", "bright green.", None)]),
        "no column 'prompt'; columns: chosen, rejected; name another with --prompt_column",
        Read([("The sea is", "blue.", 1.0), ("The sea is", "bright green.", 2.0)]),
    ),
    Format(
        "the same with a prompt under another name",
        jsonl({"question": Q, "chosen": GOOD, "rejected": BAD}),
        Read(PAIR, {"prompt_column": "question"}),
        Read([Q], {"prompt_column": "question"}),
        Read(BOTH, {"prompt_column": "question"}),
    ),
    Format(
        "chosen and rejected that repeat the prompt, text",
        jsonl({"prompt": Q, "chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"}),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "chosen and rejected that repeat the prompt, messages",
        jsonl({"prompt": Q, "chosen": [user(Q), bot(GOOD)], "rejected": [user(Q), bot(BAD)]}),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "several turns that differ before the last",
        jsonl({"chosen": [*TURNS, bot(GOOD)], "rejected": [user("Hello."), bot("Yes?"), user(Q), bot(BAD)]}),
        "1 that diverge before the last turn",
        Read([MANY], {"prompt_column": "chosen"}),
    ),
    Format(
        "a conversation that ends in the user's turn",
        jsonl({"prompt": Q, "chosen": [bot(GOOD), user("Thanks.")], "rejected": [bot(BAD)]}),
        "1 whose last turn is not the assistant's",
    ),
    Format(
        "TRL prompt-completion",
        jsonl({"prompt": Q, "completion": GOOD}),
        COLUMN,
        Read([Q]),
        Read([(Q, GOOD, 3.0)], {"response_column": "completion"}),
    ),
    Format(
        "TRL unpaired preference (a label true or false is 1 or 0)",
        jsonl({"prompt": [user(Q)], "completion": [bot(GOOD)], "label": True}),
        COLUMN,
        Read([Q]),
        Read([(Q, GOOD, 1.0)], {"response_column": "completion", "reward_column": "label"}),
    ),
    Format(
        "one conversation per row (SFT)",
        jsonl({"messages": [*TURNS, bot(GOOD)]}),
        COLUMN,
        Read([MANY], {"prompt_column": "messages"}),
    ),
    Format("text without a prompt", jsonl({"text": Q}), COLUMN, Read([Q], {"prompt_column": "text"})),
    Format(
        "`tools`, `functions` or `chat_template_kwargs` that are not empty",
        jsonl({**PLAIN, "tools": [{"name": "search"}]}),
        *["column 'tools': [{'name': 'search'}] would change the prompt"] * 3,
    ),
    Format("`tools` that are empty or null", jsonl({**PLAIN, "tools": []}), Read(PAIR), Read([Q]), Read(BOTH)),
    Format(
        "`images`, `videos` or `audio`",
        jsonl({**PLAIN, "images": ["sea.png"]}),
        *["column 'images': ['sea.png'] would change the prompt"] * 3,
    ),
    Format(
        "messages with `tool_calls` (`content` null or not)",
        jsonl({"prompt": [user(Q), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, user("?")]}),
        "",
        "message 1: 'tool_calls' ([{'id': '1'}]) is not passed to the chat template",
    ),
    Format(
        "messages with `reasoning_content` or `thinking`",
        jsonl({"prompt": [user(Q), {**bot("Hm."), "reasoning_content": "..."}, user("?")]}),
        "",
        "message 1: 'reasoning_content' ('...') is not passed to the chat template",
    ),
    Format(
        "messages with other keys (`name`, `id`, `weight`: not read)",
        jsonl({**cells(), "prompt": [{**user(Q), "name": "Ann", "weight": 1}]}),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "`content` in parts, all of them text",
        jsonl({**cells(), "prompt": [user([{"type": "text", "text": part} for part in ("What is ", "the sea?")])]}),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "`content` in parts, one of them an image",
        jsonl({**cells(), "prompt": [user([{"type": "image_url", "image_url": {"url": "sea.png"}}])]}),
        *["message 0: expected an object with 'role' and 'content' as text, got a part of type 'image_url'"] * 3,
    ),
    Format(
        "ShareGPT (`from`, `value`; roles human and gpt)",
        jsonl(
            {
                "conversations": [{"from": "human", "value": Q}],
                "chosen": {"from": "gpt", "value": GOOD},
                "rejected": {"from": "gpt", "value": BAD},
            }
        ),
        Read(PAIR, {"prompt_column": "conversations"}),
        Read([Q], {"prompt_column": "conversations"}),
        Read(BOTH, {"prompt_column": "conversations"}),
    ),
    Format(
        "a role that no template knows",
        jsonl({"prompt": [{"role": "narrator", "content": Q}]}),
        "",
        "the role 'narrator' is not known; it must be one of user, assistant, system",
    ),
    Format(
        "one message as an object",
        jsonl({"prompt": user(Q), "chosen": bot(GOOD), "rejected": bot(BAD)}),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "UltraFeedback binarized, with the margin of its two scores",
        jsonl(
            {
                "prompt": Q,
                "chosen": [user(Q), bot(GOOD)],
                "rejected": [user(Q), bot(BAD)],
                "score_chosen": 8.5,
                "score_rejected": 6.0,
            }
        ),
        Read([(Q, GOOD, BAD, 2.5)], {"margin_column": "score_chosen-score_rejected"}),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "HelpSteer2 (one attribute as the reward)",
        jsonl({"prompt": Q, "response": GOOD, "helpfulness": 4, "verbosity": 1}),
        COLUMN,
        Read([Q]),
        Read([(Q, GOOD, 4.0)], {"reward_column": "helpfulness"}),
    ),
    Format(
        "HelpSteer3 (`overall_preference` below 0: the first response is better)",
        jsonl({"context": [user(Q)], "response1": BAD, "response2": GOOD, "overall_preference": 2}),
        Read(
            [(Q, GOOD, BAD, 2.0)],
            {"prompt_column": "context", "chosen_column": "response1", "rejected_column": "response2"},
        ),
        Read([Q], {"prompt_column": "context"}),
    ),
    Format(
        "Orca DPO pairs (a `system` column)",
        jsonl({"system": "Be brief.", "question": Q, "chosen": GOOD, "rejected": BAD}),
        Read(SYSTEM_PAIR, {"prompt_column": "question"}),
        Read([TALK_TEXT], {"prompt_column": "question"}),
        Read([(TALK_TEXT, GOOD, 3.0), (TALK_TEXT, BAD, 3.0)], {"prompt_column": "question"}),
    ),
    Format(
        "a system turn under another name",
        jsonl({"instruction": "Be brief.", **PLAIN}),
        Read(SYSTEM_PAIR, {"system_column": "instruction"}),
        Read([TALK_TEXT], {"system_column": "instruction"}),
        Read([(TALK_TEXT, GOOD, 3.0), (TALK_TEXT, BAD, 3.0)], {"system_column": "instruction"}),
    ),
    Format(
        "Anthropic HH, one turn and several",
        jsonl({"chosen": f"{MANY} {GOOD}", "rejected": f"{MANY} {BAD}"}),
        Read(MANY_PAIR),
        Read([MANY], {"prompt_column": "chosen"}),
        Read([(MANY, GOOD, 3.0), (MANY, BAD, 3.0)]),
    ),
    Format(
        "an HH dialogue that the human has the last word in",
        jsonl({"prompt": f"\n\nHuman: {Q}", "chosen": GOOD, "rejected": BAD}),
        Read([(HH, GOOD, BAD, None)]),
        Read([HH]),
        Read([(HH, GOOD, 3.0), (HH, BAD, 3.0)]),
    ),
    Format(
        "TL;DR comparisons (`info`, `summaries`, `choice`)",
        jsonl({"info": {"post": Q}, "summaries": [{"text": GOOD}, {"text": BAD}], "choice": 0}),
        "no column 'chosen'; columns: info, summaries, choice; name another with --chosen_column",
        "no column 'prompt'; columns: info, summaries, choice; name another with --prompt_column",
        "no column 'prompt'",
    ),
    Format(
        "GSM8K (`answer` reaches reward functions that take it)",
        jsonl({"question": Q, "answer": GOOD}),
        COLUMN,
        Read([Q], {"prompt_column": "question"}),
        Read([(Q, GOOD, 3.0)], {"prompt_column": "question", "response_column": "answer"}),
    ),
    Format(
        "RewardBench 2 (several rejected texts in one row)",
        jsonl({"prompt": Q, "chosen": [GOOD], "rejected": [BAD, "No."]}),
        "a list of texts needs one row per text",
        Read([Q]),
    ),
    Format(
        "one response empty or null (counted; an error above `max_dropped_share`)",
        jsonl(*[PLAIN] * 4, {**PLAIN, "chosen": None}),
        Read(PAIR * 4),
        Read([Q] * 5),
    ),
    Format("`.parquet`", parquet(cells()), Read(PAIR), Read([Q]), Read(BOTH)),
    Format("`.arrow`", arrow(cells()), Read(PAIR), Read([Q]), Read(BOTH)),
    Format("`.csv`", separated(",", "data.csv", str, PLAIN), Read(PAIR), Read([Q]), Read(BOTH)),
    Format("`.tsv`", separated("\t", "data.tsv", str, PLAIN), Read(PAIR), Read([Q]), Read(BOTH)),
    Format(
        "`.csv`, messages as JSON",
        separated(",", "data.csv", json.dumps, cells()),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "`.csv` with messages as pandas writes a list",
        separated(",", "data.csv", repr, cells()),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "`.csv` with messages as pandas writes a parquet file's array",
        separated(",", "data.csv", numpy_print, {**cells(), "prompt": TURNS}),
        Read(MANY_PAIR),
        Read([MANY]),
        Read([(MANY, GOOD, 3.0), (MANY, BAD, 3.0)]),
    ),
    Format(
        "`.csv` with messages that were cut off",
        separated(",", "data.csv", lambda cell: repr(cell)[:-4] + "]", cells()),
        "column 'chosen': looks like a list of messages and cannot be read",
        "column 'prompt': looks like a list of messages and cannot be read",
    ),
    Format("`.ndjson`", jsonl(PLAIN, name="data.ndjson"), Read(PAIR), Read([Q]), Read(BOTH)),
    Format("`.json` with a list", text(json.dumps([PLAIN]), "data.json"), Read(PAIR), Read([Q]), Read(BOTH)),
    Format("`.json` with lines", jsonl(PLAIN, PLAIN, name="data.json"), Read(PAIR * 2), Read([Q] * 2), Read(BOTH)),
    Format(
        '`.json`, `{"data": [...]}`',
        text(json.dumps({"data": [PLAIN]}), "d.json"),
        Read(PAIR),
        Read([Q]),
        Read(BOTH),
    ),
    Format(
        "`.json` with a list per column",
        text(json.dumps({"prompt": [Q], "chosen": [GOOD]}), "data.json"),
        *["save rows as a list or one per line (pandas: to_json(orient='records'))"] * 3,
    ),
    Format("`.txt`, one prompt per line", text(f"{Q}\n\n", "data.txt"), COLUMN, Read([Q])),
    Format("a folder of `save_to_disk`", saved(cells()), Read(PAIR), Read([Q]), Read(BOTH)),
    Format("a `DatasetDict` saved to disk, as `folder:test`", saved(PLAIN, "test"), Read(PAIR), Read([Q]), Read(BOTH)),
    Format(
        "the same with a split that is not there",
        saved(PLAIN, "dev"),
        *["has no split 'dev'; it has test, train: name one as"] * 3,
    ),
    Format("a folder of shards (`train-00000-of-00002.jsonl`)", shards(PLAIN, "hub"), Read(PAIR * 2), Read([Q] * 2)),
    Format("the same as `folder:train`", shards(PLAIN, "hub:train"), Read(PAIR * 2), Read([Q] * 2)),
    Format("a glob", shards(PLAIN, "hub/data/train-*.jsonl"), Read(PAIR * 2), Read([Q] * 2), Read(BOTH)),
    Format(
        "a glob of several kinds of files",
        lambda folder: (jsonl(PLAIN)(folder), text(Q, "data.txt")(folder)) and str(folder / "data.*"),
        *["holds files of several kinds or unknown ones (.jsonl, .txt)"] * 3,
    ),
]


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| format | `reward` | prompts | `value` |", "|---|---|---|---|"]
    for one in FORMATS:
        lines.append(f"| {one.name} | {_cell(one.pairs)} | {_cell(one.prompts)} | {_cell(one.values)} |")
    return "\n".join(lines)


def _cell(reading: Read | str) -> str:
    if isinstance(reading, Read):
        flags = " ".join(f"`--{name} {value}`" for name, value in reading.options.items())
        return f"read with {flags}" if flags else "read"
    return f"refused: {reading}".replace("|", "\\|") if reading else ""


if __name__ == "__main__":
    print(table())
