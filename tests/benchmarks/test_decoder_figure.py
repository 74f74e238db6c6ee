"""The bake-off's figure is drawn from whatever arms a summary has."""

from __future__ import annotations

import json

import pytest

from benchmarks.decoder_figure import _NATS, Summary, main
from vgf_llm.errors import DataError


def entry(prompts: int = 60, tflops: float = 1.0, gold: float = 0.5, nll: float = 2.0) -> dict:
    means = {"proxy": 2 * gold, "gold": gold, "nll": nll, "selected_gold": gold, "tflops": tflops}
    measures = {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for name, mean in means.items()}
    return {"prompts": prompts, "seeds": 1, "nats": None, **measures}


def full_summary() -> dict:
    arms = {"base": entry(gold=0.3)}
    arms |= {f"best-of-{n}": entry(tflops=n / 100, gold=0.3 + n / 400) for n in (16, 32, 64, 128)}
    for k, decoder in enumerate(
        ["prior", "prior 4 nats", "block", "pivot", "pivot all", "edit", "edit greedy", "nearest"]
    ):
        arms |= {f"{decoder} @{n}": entry(12, n / 100, 0.4 + k / 50 + n / 400) for n in (16, 32, 64, 128)}
    arms |= {f"prior {n} nats, cloud": entry(12, gold=0.4 + n / 100, nll=2 + n / 50) for n in (1, 2, 4, 8, 16, 32)}
    arms |= {f"pivot {n} rounds, cloud": entry(12, gold=0.35 + n / 90, nll=2 + n / 200) for n in (2, 4, 8, 16, 32)}
    return {"arms": arms, "alpha": 0.12}


@pytest.mark.parametrize(
    "kept", [lambda name: True, lambda name: name.startswith("best"), lambda name: "cloud" in name, lambda name: False]
)
def test_a_small_png_comes_of_any_arms(kept, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = full_summary()
    found["arms"] = {name: one for name, one in found["arms"].items() if kept(name)}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    main([str(tmp_path / "summary.json"), str(tmp_path / "new" / "figure.png")])
    drawn = (tmp_path / "new" / "figure.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) < 150_000
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == len(drawn)


def test_an_arm_on_fewer_prompts_is_placed_by_its_paired_difference():
    """Best-of-128 has 0.6 on 60 prompts; the arm, 0.7 on 12 of them, is 0.05 better there: 0.65, not 0.7."""
    arms = {"best-of-128": entry(60, gold=0.6), "prior @16": entry(12, gold=0.7), "prior @32": entry(60, gold=0.7)}
    difference = {"selected_gold": {"mean": 0.05, "low": 0.0, "high": 0.1}}
    summary = Summary(arms, {"best-of-128": {"prior @16": difference, "prior @32": difference}}, None)
    point = summary.point("prior @16", "selected_gold", "best-of-128")
    assert (point.mean, point.low, point.high) == pytest.approx((0.65, 0.6, 0.7)) and point.fewer_prompts
    assert summary.point("prior @32", "selected_gold", "best-of-128").mean == pytest.approx(0.7)
    assert summary.point("prior @16", "nats", "best-of-128") is None
    assert summary.point("absent", "gold", "base") is None


def test_budgets_and_levels_come_in_order():
    summary = Summary(full_summary()["arms"], {}, None)
    assert [size for size, _ in summary.budgets(_NATS)] == [1, 2, 4, 8, 16, 32]
    lines = dict(summary.levels())
    assert next(iter(lines)) == "best-of-N"
    assert lines["pivot all"] == [f"pivot all @{n}" for n in (16, 32, 64, 128)]


def test_another_file_is_named(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "torn.json").write_text('{"arms":')
    for name in ("other.json", "torn.json", "absent.json"):
        with pytest.raises(DataError, match=name):
            Summary.read(tmp_path / name)
