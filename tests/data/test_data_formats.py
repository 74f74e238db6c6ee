"""Every line of the table in docs/data.md is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reward_models.logged import load_logged
from reward_models.settings import RewardScript
from reward_models.value_settings import ValueScript
from tests.data.data_formats import FORMATS, Format, Read, table
from vgf_llm.data.dialogue import conversation_text
from vgf_llm.data.prompts import load_preferences, load_prompts
from vgf_llm.errors import DataError
from vgf_llm.settings import AnswerSettings

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_page_has_the_table():
    assert table() in PAGE.read_text(), "write the output of `python -m tests.data.data_formats` into docs/data.md"


def outcome(reading, read, options_of: type):
    """Run one cell of the table: compare what is read, or the refusal."""
    if reading == "":
        return
    if isinstance(reading, str):
        with pytest.raises(DataError, match=re.escape(reading)):
            read()
        return
    assert set(reading.options) <= set(options_of.__dataclass_fields__), "an option that no command has"
    assert read(**reading.options) == reading.found


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_a_format(tmp_path, one: Format):
    source = one.write(tmp_path)

    def pairs(**options):
        found = load_preferences(source, **options).pairs
        return [
            (conversation_text(pair.prompt), pair.chosen.strip(), pair.rejected.strip(), pair.margin) for pair in found
        ]

    def prompts(**options):
        options = {("column" if name == "prompt_column" else name): value for name, value in options.items()}
        return [conversation_text(prompt) for prompt in load_prompts(source, **options)]

    def values(**options):
        found = load_logged(source, reward_function="length_words", **options)
        return [(conversation_text(row.prompt), row.response.strip(), row.reward) for row in found]

    outcome(one.pairs, pairs, RewardScript)
    outcome(one.prompts, prompts, AnswerSettings)
    outcome(one.values, values, ValueScript)


def test_every_format_says_something():
    assert all(isinstance(part, Read) or part for one in FORMATS for part in (one.pairs or one.prompts,))
    assert len({one.name for one in FORMATS}) == len(FORMATS) > 50
