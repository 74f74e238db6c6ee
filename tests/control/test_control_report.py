"""What the report joins, what it refuses to join, and what it says of intervals without width."""

import json

import pytest

from vgf_llm.control.report import summarise, table
from vgf_llm.errors import DataError


def evaluation(arm, successes, steps=0, size=None):
    return {
        "step": 10,
        "arm": arm,
        "flow_steps": steps,
        "step_size": size,
        "moved": 0.0,
        "returns": [-1.0] * len(successes),
        "successes": successes,
    }


def write_run(folder, name, rows, **config):
    run = folder / str(name)
    run.mkdir(parents=True)
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.json").write_text(json.dumps({"seed": name, "env": "walk", "data": "walk.npz", **config}))
    return run


def test_seeds_are_joined_and_the_best_budget_is_chosen_on_the_others(tmp_path):
    """Three seeds of two episodes. On seed 0 the step wins (100 against 50), on 1 and 2 best-of-2 does.

    Others of seed 0: best-of-2 has 100, the step 0 -> best-of-2, which scores 50 on seed 0. Others of seed 1:
    best-of-2 (50 + 100) / 2, the step (100 + 0) / 2 -> best-of-2, 100; the same for seed 2: mean 250 / 3.
    """
    arms = {"clone": [0.0, 0.0], "best-of-2": [1.0, 1.0], "1 x 0.1": [0.0, 0.0]}
    for seed in range(3):
        found = {**arms, "best-of-2": [1.0, 0.0], "1 x 0.1": [1.0, 1.0]} if seed == 0 else arms
        rows = [
            evaluation(arm, value, int(arm[0] == "1"), 0.1 if arm[0] == "1" else None) for arm, value in found.items()
        ]
        write_run(tmp_path, seed, rows)
    result = summarise([tmp_path / str(seed) for seed in range(3)])
    best = result["arms"]["best budget"]
    assert best["chosen"] == ["best-of-2"] * 3
    assert best["score"][0] == pytest.approx(250 / 3, abs=0.01)
    assert result["arms"]["clone"]["score"] == [0, 0, 0]
    assert result["arms"]["1 x 0.1"]["minus_best_of_n"][0] == pytest.approx(100 / 3 - 250 / 3, abs=0.01)
    assert "| best-of-2 | 83.3 [" in table(result)


def test_of_budgets_that_always_succeed_the_faster_is_chosen(tmp_path):
    for seed in range(2):
        rows = [
            evaluation(arm, [1.0, 1.0], int(arm[0] == "1"), 0.1 if arm[0] == "1" else None) | {"returns": [total] * 2}
            for arm, total in (("clone", -9.0), ("best-of-2", -5.0), ("1 x 0.1", -4.0))
        ]
        write_run(tmp_path, seed, rows)
    arms = summarise([tmp_path / str(seed) for seed in range(2)])["arms"]
    assert arms["best budget"]["chosen"] == ["1 x 0.1"] * 2
    assert arms["1 x 0.1"]["return_minus_best_of_n"] == [1.0, 1.0, 1.0]


TWO = [evaluation("clone", [0.0, 1.0]), evaluation("best-of-2", [1.0, 1.0])]


def test_arms_of_unequal_episodes_in_one_run_are_refused_with_their_file(tmp_path):
    """What --only_evaluate with other eval_episodes leaves; once all arms have been evaluated again it is whole."""
    run = write_run(tmp_path, 0, [*TWO, evaluation("2 x 0.1", [1.0] * 3, 2, 0.1)])
    with pytest.raises(DataError, match=r"0/evaluations.jsonl', step 10: .*clone: 2, best-of-2: 2, 2 x 0.1: 3"):
        summarise([run])
    with (run / "evaluations.jsonl").open("a") as file:
        file.writelines(json.dumps(evaluation(arm, [1.0] * 3)) + "\n" for arm in ("clone", "best-of-2"))
    assert summarise([run])["episodes"] == 3


@pytest.mark.parametrize("change", [{"env": "maze"}, {"data": "other.npz"}, {"reward_shift": -1.0}, {"seed": 0}])
def test_runs_that_are_no_seeds_of_one_task_are_refused_with_folder_and_key(tmp_path, change):
    runs = [write_run(tmp_path, 0, TWO), write_run(tmp_path, 1, TWO, **change)]
    with pytest.raises(DataError, match=f"1/config.json': {next(iter(change))}: "):
        summarise(runs)


def test_a_run_given_twice_and_a_folder_without_configuration_are_refused(tmp_path):
    run = write_run(tmp_path, 0, TWO)
    with pytest.raises(DataError, match="seed: 0 is also that of"):
        summarise([run, run])
    (run / "config.json").unlink()
    with pytest.raises(DataError, match="0/config.json' cannot be read"):
        summarise([run])


def test_the_table_bounds_a_rate_whose_bootstrap_interval_has_no_width(tmp_path):
    """0 of 10: the rate p with (1 - p)^10 = 0.025 is 30.8%, the table of Clopper and Pearson."""
    rows = [evaluation("clone", [0.0] * 5), evaluation("best-of-2", [1.0] * 4 + [0.0])]
    shown = table(summarise([write_run(tmp_path, seed, rows) for seed in range(2)])).splitlines()
    assert shown[-2] == "" and shown[-1].startswith("clone: all 10 episodes ended alike")
    assert "0 of 10 is 30.8% (for 10 of 10: 69.2%)" in shown[-1]
    assert "no width" not in table(summarise([write_run(tmp_path / "other", 0, TWO[:1])]))
