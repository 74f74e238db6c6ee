"""What is read from OGBench, D4RL and Minari files, and what is refused with file and row."""

import numpy as np
import pytest

from tests.control.tiny import walk
from vgf_llm.control.data import Buffer, Transitions
from vgf_llm.control.envs import Bounds, make_env
from vgf_llm.control.loaders import from_rows, load
from vgf_llm.errors import ConfigError, DataError


def rows(count=6, **changes):
    """Two episodes of three rows; the second ends because its task is done."""
    generator = np.random.default_rng(0)
    fields = {
        "observations": np.arange(2.0 * count).reshape(count, 2),
        "actions": generator.uniform(-1, 1, (count, 1)),
        "rewards": np.arange(float(count)),
        "terminals": np.array([0, 0, 0, 0, 0, 1][:count]),
        "timeouts": np.array([0, 0, 1, 0, 0, 0][:count]),
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not None}


def test_rows_whose_episode_ran_out_of_time_have_no_next_state():
    """Row 2 is left out, so row 1 ends episode 0; row 5 stays, masked."""
    data = from_rows("f", rows(), None)
    assert data.rewards.tolist() == [0, 1, 3, 4, 5]
    assert data.masks.tolist() == [1, 1, 1, 1, 0]
    assert data.ends.tolist() == [False, True, False, False, True]
    assert data.next_observations[:4].tolist() == [[2, 3], [4, 5], [8, 9], [10, 11]]


def test_next_observations_tell_episodes_apart():
    following = rows()["observations"] + 2
    following[2] += 50
    data = from_rows("f", rows(timeouts=None, next_observations=following), None)
    assert len(data) == 6
    assert data.ends.tolist() == [False, False, True, False, False, True]


def test_actions_are_scaled_from_the_environments_bounds():
    bounds = Bounds(np.array([-2.0]), np.array([6.0]))
    data = from_rows("f", rows(actions=np.array([[-2.0], [2], [6], [0], [4], [2]])), bounds)
    assert data.actions[:, 0].tolist() == [-1, 0, -0.5, 0.5, 0]
    assert bounds.from_unit(np.array([-1.0, 0.5])).tolist() == [-2, 4]


BAD = [
    ({"rewards": None}, "field 'rewards' is missing"),
    ({"timeouts": None}, "'timeouts' or 'next_observations'"),
    ({"rewards": np.zeros((6, 1))}, r"'rewards' needs 1 dimension\(s\), has shape \(6, 1\)"),
    ({"rewards": np.zeros(5)}, "'rewards' has 5 rows, 'actions' has 6"),
    ({"rewards": np.array([0, 0, 0, np.nan, 0, 0])}, "'rewards', row 3: not finite: nan"),
    ({"observations": np.full((6, 2), np.inf)}, "'observations', row 0: not finite"),
    ({"actions": np.array([[0.0], [0], [0], [0], [-1.5], [0]])}, "'actions', row 4: outside the bounds"),
    ({"timeouts": np.array([0, 1, 1, 0, 0, 0])}, "episode 1, which ends at row 2, holds no transition"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_rows_are_refused_by_file_and_row(change, message):
    with pytest.raises(DataError, match=f"some.hdf5: .*{message}"):
        from_rows("some.hdf5", rows(**change), None)


def test_an_empty_file_is_refused():
    empty = {key: value[:0] for key, value in rows().items()}
    with pytest.raises(DataError, match="holds no row"):
        from_rows("f", empty, None)


def test_rounding_outside_the_bounds_is_clipped():
    assert from_rows("f", rows(actions=np.full((6, 1), 1.0 + 1e-5)), None).actions.max() == 1


def test_rewards_are_shifted_and_scaled_by_hand():
    """Returns after the shift by -1: (0-1) + (1-1) = -1 and 2 + 3 + 4 = 9; their span 10 becomes 1000."""
    data, scale = from_rows("f", rows(), None).with_rewards(-1.0, normalise=True)
    assert scale == pytest.approx(100)
    assert data.rewards.tolist() == [-100, 0, 200, 300, 400]
    with pytest.raises(DataError, match="every episode of the data returns"):
        from_rows("f", rows(rewards=np.zeros(6)), None).with_rewards(0.0, normalise=True)


def test_moments_of_observations_by_hand():
    columns = np.array([[1.0, 5.0], [3.0, 5.0]], dtype=np.float32)
    flat = np.zeros(2, dtype=np.float32)
    mean_O, std_O = Transitions(columns, columns, flat, flat, columns, flat > 0).observation_moments()
    assert mean_O.tolist() == [2.0, 5.0]
    assert std_O.tolist() == [1.0, 1.0]  # the second column never changes


def test_hdf5_and_minari_folders_are_read_alike(tmp_path):
    h5py = pytest.importorskip("h5py")
    data = walk(episodes=5)
    with h5py.File(tmp_path / "walk.hdf5", "w") as file:
        for key, values in data.items():
            file.create_dataset(key, data=values)
    (tmp_path / "minari" / "data").mkdir(parents=True)
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    with h5py.File(tmp_path / "minari" / "data" / "main_data.hdf5", "w") as file:
        for index, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            group = file.create_group(f"episode_{index}")
            group["observations"] = np.concatenate([data["observations"][a:b], data["next_observations"][b - 1 : b]])
            group["actions"], group["rewards"] = data["actions"][a:b], data["rewards"][a:b]
            group["terminations"], group["truncations"] = data["terminals"][a:b], data["timeouts"][a:b]
    bounds = Bounds(-2 * np.ones(2), 2 * np.ones(2))
    plain = load(str(tmp_path / "walk.hdf5"), None, None, bounds)
    episodes = load(str(tmp_path / "minari"), None, None, bounds)
    assert plain.digest() == episodes.digest()
    with h5py.File(tmp_path / "minari" / "data" / "main_data.hdf5", "a") as file:
        del file["episode_3"]["rewards"]
    with pytest.raises(DataError, match="main_data.hdf5, episode_3: field 'rewards' is missing"):
        load(str(tmp_path / "minari"), None, None, bounds)


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="give a path"):
        load(None, "Hopper-v5", None, None)
    with pytest.raises(DataError, match="does not exist"):
        load(str(tmp_path / "none.npz"), None, None, None)
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(ConfigError, match="name the OGBench task"):
        load(str(tmp_path / "a.npz"), "Hopper-v5", None, None)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        make_env("tests.control.tiny:nothing")


def test_buffer_keeps_online_transitions_apart():
    data = Transitions(*(np.zeros(s, np.float32) for s in ((3, 2), (3, 1), 3, 3, (3, 2))), np.zeros(3, bool))
    buffer = Buffer(data, 2, "cpu")
    buffer.add(observations=np.ones(2), actions=np.ones(1), rewards=7.0, masks=1.0, next_observations=np.ones(2))
    kept = buffer.online()
    assert kept["rewards"].tolist() == [7.0]
    other = Buffer(data, 2, "cpu")
    other.restore(kept)
    assert other.size == 4 and other.tensors["rewards"].tolist() == [0, 0, 0, 7, 0]
