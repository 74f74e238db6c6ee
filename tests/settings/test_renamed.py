"""Keys of earlier versions: one wording, with the line to write, wherever the key stands."""

from __future__ import annotations

import pytest

from vgf_llm.errors import ConfigError
from vgf_llm.serving.settings import ServeSettings
from vgf_llm.settings.parse import parse


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("most: {max_tokens: 5}", "limits.max_tokens: 5"),
        ("most.max_tokens: 5", "limits.max_tokens: 5"),
        ("most: {max_tokens: 5, steps: 3}", 'limits: {"max_tokens": 5, "steps": 3}'),
    ],
)
def test_a_recipe_is_told_the_line(text, line, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{text}\n")
    with pytest.raises(ConfigError) as caught:
        parse(ServeSettings, argv=["--config", str(recipe)])
    assert str(caught.value) == f"{recipe}: key 'most' has another name now; write '{line}'"


@pytest.mark.parametrize("argv", [["--most.max_tokens", "5"], ["--most.max_tokens=5"]])
def test_a_flag_is_told_the_flag(argv):
    with pytest.raises(
        ConfigError, match="flag '--most.max_tokens' has another name now; write '--limits.max_tokens 5'"
    ):
        parse(ServeSettings, argv=argv)
