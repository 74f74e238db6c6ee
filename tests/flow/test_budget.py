"""The budget's defaults, its limits, and what importing it costs."""

import dataclasses
import math
import subprocess
import sys

import pytest

from vgf_llm.flow.budget import TransportBudget


def loaded_after(code: str, *names: str) -> list[str]:
    """Which of the named modules a fresh interpreter has loaded after `code`."""
    probe = f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_none_is_best_of_n():
    assert TransportBudget.none().is_none
    assert TransportBudget.none().steps == 0
    assert not TransportBudget().is_none


def test_budget_is_frozen_and_comparable():
    budget = TransportBudget(steps=3)
    assert budget == TransportBudget(steps=3) and hash(budget) == hash(TransportBudget(steps=3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.steps = 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", -1),
        ("steps", 1.5),
        ("steps", True),
        ("rounds", 0),
        ("step", "rmsprop"),
        ("kernel", "RBF"),
        ("step_size", 0.0),
        ("step_size", math.nan),
        ("step_size", math.inf),
        ("temperature", 0.0),
        ("temperature", -2),
        ("nats", -0.5),
        ("nats", None),
        ("max_token_nats", 0),
        ("max_token_nats", math.nan),
        ("bandwidth", 0.0),
        ("bandwidth", "auto"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(key, value):
    with pytest.raises(ValueError) as error:
        TransportBudget(**{key: value})
    assert str(error.value).startswith(f"{key} must be ") and repr(value) in str(error.value)


def test_yaml_text_number_gets_a_hint():
    with pytest.raises(ValueError, match=r"step_size must be .* got '1e-5' \(YAML .* write 1\.0e-5\)"):
        TransportBudget(step_size="1e-5")


def test_limits_are_allowed():
    budget = TransportBudget(steps=0, nats=0.0, max_token_nats=math.inf, bandwidth=0.1, step_size=1, temperature=1)
    assert budget.is_none


def test_the_budget_needs_no_torch():
    code = "import vgf_llm.flow\nfrom vgf_llm.flow.budget import TransportBudget\nvgf_llm.flow.TransportBudget(steps=2)"
    assert loaded_after(code, "torch", "numpy", "transformers") == []


def test_the_flow_needs_torch_only():
    code = (
        "import torch\nbefore = set(sys.modules)\nimport vgf_llm.flow as flow\n"
        "[getattr(flow, name) for name in flow.__all__]\n"
        "flow.transport(torch.zeros(1, 2, 3), flow.autograd_value(lambda x: x.sum(-1)), flow.TransportBudget())"
    )
    heavy = ("transformers", "peft", "trl", "datasets", "ot", "scipy", "rich", "jsonargparse", "matplotlib", "yaml")
    assert loaded_after(code, "torch", "vgf_llm.flow.trajectory", *heavy) == ["torch", "vgf_llm.flow.trajectory"]


def test_unknown_name_is_an_attribute_error():
    import vgf_llm.flow

    with pytest.raises(AttributeError, match="no attribute 'transpot'"):
        _ = vgf_llm.flow.transpot
    assert set(vgf_llm.flow.__all__) <= set(dir(vgf_llm.flow))
