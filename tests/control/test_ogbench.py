"""OGBench's own environments, oracles and loader; skipped where the package is not installed."""

import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ogbench = pytest.importorskip("ogbench", reason="needs the control extra: pip install 'vgf-llm[control]'")

from vgf_llm.control.collect import CollectSettings, collect, environment_of  # noqa: E402
from vgf_llm.control.envs import bounds_of, make_env, reset  # noqa: E402
from vgf_llm.control.loaders import load  # noqa: E402
from vgf_llm.control.settings import AgentSettings, DataSettings, TrainSettings  # noqa: E402
from vgf_llm.control.train import run  # noqa: E402
from vgf_llm.errors import ConfigError, DataError  # noqa: E402

MAZE = "pointmaze-medium-navigate-singletask-task1-v0"


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    figures = collect(CollectSettings("pointmaze-medium-navigate-v0", str(folder), 2, 1, 301, 0.5))
    assert figures["transitions"] == 900
    return folder / "pointmaze-medium-navigate-v0.npz"


def test_names_split_into_environment_and_kind():
    assert environment_of("puzzle-3x3-play-v0") == ("puzzle-3x3-v0", "play")


def test_collected_files_load_with_the_packages_own_loader(maze):
    _, train, validation = ogbench.make_env_and_datasets(MAZE, dataset_path=str(maze))
    assert train["observations"].shape == (600, 2) and validation["actions"].shape == (300, 2)
    assert set(np.unique(train["rewards"])) <= {-1.0, 0.0}
    env = make_env(MAZE)
    ours = load(str(maze), MAZE, env, bounds_of(env, MAZE))
    for key in ("observations", "actions", "rewards", "masks", "next_observations"):
        assert np.array_equal(getattr(ours, key), train[key])
    assert np.abs(np.diff(ours.observations, axis=0)[:298]).max() < 0.5  # one episode is one walk


def test_a_maze_walker_visits_its_aims(maze):
    """It crosses at least six of the maze's cells in 300 steps."""
    cells = {tuple(cell) for cell in np.round(np.load(maze)["observations"][:301] / 4).astype(int)}
    assert len(cells) >= 6


@pytest.mark.parametrize("dataset", ["cube-single-play-v0", "cube-single-noisy-v0", "scene-play-v0"])
def test_manipulation_oracles_move_things(dataset, tmp_path):
    collect(CollectSettings(dataset, str(tmp_path), 1, 1, 120))
    rows = np.load(tmp_path / f"{dataset}.npz")
    assert np.abs(rows["actions"]).max() <= 1
    assert np.ptp(rows["qpos"][:, 14:17], axis=0).max() > 0.02  # the cube


def test_no_behaviour_for_a_pair_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no scripted behaviour makes 'play' data in 'pointmaze-medium-v0'"):
        collect(CollectSettings("pointmaze-medium-play-v0", str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qpos": None}, "field 'qpos' is missing"),
        ({"actions": np.full((602, 2), 3.0)}, "'actions', row 0: outside the bounds"),
        ({"terminals": np.arange(602) % 301 >= 299}, "episode 1, which ends at row 300, holds no transition"),
        ({"terminals": np.arange(602) == 300}, "'terminals', row 601: the last row must end an episode, has False"),
        ({"terminals": 0.5 * (np.arange(602) == 601)}, "'terminals', row 601: needs 0 or 1, has 0.5"),
        ({"observations": np.full((602, 2), 1e39)}, "'observations', row 0: not finite in float32"),
        ({"actions": np.zeros((602, 3))}, "'actions' has 3 columns, the environment's has 2"),
        ({"qpos": np.zeros((602, 1))}, "'qpos' has 1 columns, the environment's has 2"),
        ({"qpos": np.zeros((602, 3))}, "'qpos' has 3 columns, the environment's has 2"),
        ({"qvel": np.zeros((601, 2))}, r"'qvel' has shape \(601, 2\), 'actions' has 602 rows"),
        ({"actions": np.full((602, 2), "a")}, "'actions' needs real numbers, has type <U1"),
    ],
)
def test_bad_files_are_refused(maze, tmp_path, change, message):
    rows = {key: value for key, value in {**np.load(maze), **change}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **rows)
    env = make_env(MAZE)
    with pytest.raises(DataError, match=f"bad.npz: .*{message}"):
        load(str(tmp_path / "bad.npz"), MAZE, env, None)


def test_an_episode_depends_on_its_seed_alone():
    env = make_env(MAZE)
    first = reset(env, 3)
    env.step(np.ones(2))
    reset(env, 4)
    assert np.array_equal(first, reset(env, 3))


def test_a_run_on_a_maze(maze, tmp_path):
    settings = TrainSettings(
        str(tmp_path), offline_steps=2, batch_size=16, eval_episodes=2, test_steps=[0, 1], device="cpu"
    )
    agent = AgentSettings(clone_hidden=[8], critic_hidden=[8], euler_steps=2, num_particles=3)
    rows = run(settings, DataSettings(env=MAZE, data=str(maze)), agent)
    assert [row["arm"] for row in rows] == ["clone", "best-of-3", "1 x 0.1"]
    assert all(len(row["successes"]) == 2 for row in rows)
