"""Every architecture passes every check, or is refused when it is loaded; docs/models.md says the same."""

import pytest

from tests.architectures.checks import CHECKS
from tests.architectures.table import listed, row, run
from tests.architectures.zoo import ZOO
from vgf_llm.errors import ModelError
from vgf_llm.models.loading import load_causal_lm, load_skeleton


@pytest.mark.parametrize("name", ZOO)
def test_an_architecture_is_right_or_refused_as_docs_models_says(name):
    architecture = ZOO[name]
    failed, found = run(architecture)
    assert not failed, "; ".join(f"{check}: {error}" for check, error in failed.items())
    assert row(name, architecture, failed, found) in listed(), "run python -m tests.architectures.table"


def test_the_page_lists_these_architectures_and_no_others():
    names = [line.split(" | ")[0].removeprefix("| ") for line in listed()]
    assert sorted(names) == sorted(ZOO)
    assert sum(not architecture.refused for architecture in ZOO.values()) >= 30 and len(CHECKS) == 16


@pytest.mark.parametrize("name", [name for name, one in ZOO.items() if one.refused])
def test_a_refusal_is_one_error_that_names_the_architecture_and_why(name, tmp_path):
    """With weights, and without (an engine's skeleton) wherever the configuration or the modules give it away."""
    architecture = ZOO[name]
    architecture.build().save_pretrained(tmp_path)
    match = rf"the architecture '{architecture.model_type}' of '.*' is not supported: .*({architecture.refused})"
    with pytest.raises(ModelError, match=match):
        load_causal_lm(str(tmp_path))
    if name != "bert":  # only its numbers show that it is not causal
        with pytest.raises(ModelError, match=match):
            load_skeleton(str(tmp_path))
