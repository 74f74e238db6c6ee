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


MORE_BAD = [
    ({"rewards": np.array([0, 0, 0, 1e39, 0, 0])}, r"'rewards', row 3: not finite in float32: 1e\+39"),
    ({"terminals": np.array([0, 0.5, 0, 0, 0, 1])}, "'terminals', row 1: needs 0 or 1, has 0.5"),
    ({"timeouts": np.array([0, 0, 2, 0, 0, 0])}, "'timeouts', row 2: needs 0 or 1, has 2"),
    ({"next_observations": np.zeros((6, 3))}, "'next_observations' has 3 columns, 'observations' has 2"),
    ({"observations": np.zeros((6, 0))}, "'observations' needs at least one column"),
    ({"actions": np.zeros((6, 0))}, "'actions' needs at least one column"),
    ({"rewards": np.array(["a"] * 6)}, "'rewards' needs real numbers, has type <U1"),
    ({"rewards": np.array([None] * 6)}, "'rewards' needs real numbers, has type object"),
]


@pytest.mark.parametrize(("change", "message"), MORE_BAD)
def test_bad_values_and_widths_are_refused(change, message):
    with pytest.raises(DataError, match=f"some.hdf5: field {message}"):
        from_rows("some.hdf5", rows(**change), None)


def test_one_column_of_actions_is_not_spread_over_three_bounds():
    with pytest.raises(DataError, match="f: field 'actions' has 1 columns, the environment's has 3"):
        from_rows("f", rows(), Bounds(-np.ones(3), np.ones(3)))


def test_transitions_of_unequal_lengths_are_refused():
    flat = np.zeros(3, np.float32)
    with pytest.raises(DataError, match="equal lengths.*'masks': 2"):
        Transitions(np.zeros((3, 2)), np.zeros((3, 1)), flat, flat[:2], np.zeros((3, 2)), flat > 0)


def episode(**changes):
    """A Minari episode of three transitions."""
    fields = {
        "observations": np.arange(8.0).reshape(4, 2),
        "actions": np.zeros((3, 1)),
        "rewards": np.arange(3.0),
        "terminations": np.array([False, False, True]),
    }
    return {**fields, **changes}


def minari(folder, *episodes, **named):
    h5py = pytest.importorskip("h5py")
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for name, fields in {**{f"episode_{i}": e for i, e in enumerate(episodes)}, **named}.items():
            for key, values in fields.items():
                file[f"{name}/{key}"] = values
    return str(folder)


BAD_EPISODES = [
    ({"rewards": np.zeros(2)}, "'rewards' has 2 rows, 'actions' has 3"),
    ({"rewards": np.zeros((3, 1))}, r"'rewards' needs 1 dimension\(s\), has shape \(3, 1\)"),
    ({"terminations": np.zeros(4, bool)}, "'terminations' has 4 rows, 'actions' has 3"),
    ({"rewards": np.array([0, np.nan, 0])}, "'rewards', row 1: not finite: nan"),
    ({"observations": np.array([[0, 0], [0, 0], [0, 0], [np.inf, 0]])}, "'observations', row 3: not finite"),
    ({"actions": np.array([[0], [0], [1.5]])}, "'actions', row 2: outside the bounds"),
    ({"actions": np.zeros((3, 2))}, "'actions' has 2 columns, that of episode_0 has 1"),
    ({"actions": 0.0}, r"'actions' needs 2 dimension\(s\), has shape \(\)"),
    ({"observations": np.zeros((4, 3))}, "'observations' has 3 columns, that of episode_0 has 2"),
    ({"terminations": np.array([0, 0.5, 1])}, "'terminations', row 1: needs 0 or 1, has 0.5"),
]


@pytest.mark.parametrize(("change", "message"), BAD_EPISODES)
def test_a_minari_episode_is_refused_by_its_name_and_row(tmp_path, change, message):
    path = minari(tmp_path / "set", episode(), episode(**change))
    with pytest.raises(DataError, match=f"main_data.hdf5, episode_1: field {message}"):
        load(path, None, None, None)


def test_lengths_that_make_up_for_each_other_are_refused(tmp_path):
    """4 and 2 rewards for two episodes of 3 have the right sum."""
    path = minari(tmp_path / "set", episode(rewards=np.zeros(4)), episode(rewards=np.zeros(2)))
    with pytest.raises(DataError, match="episode_0: field 'rewards' has 4 rows, 'actions' has 3"):
        load(path, None, None, None)


def test_a_group_of_another_name_is_no_episode(tmp_path):
    path = minari(tmp_path / "set", episode(), episode_best=episode())
    with pytest.raises(DataError, match="'episode_best' is no episode"):
        load(path, None, None, None)


def test_a_minari_field_that_is_a_group_is_refused(tmp_path):
    fields = episode()
    path = minari(tmp_path / "set", {**fields, "observations": np.zeros((4, 2))}, {"observations/x": np.zeros(3)})
    with pytest.raises(DataError, match="episode_1: field 'observations' is a group"):
        load(path, None, None, None)


def test_a_group_or_text_in_a_d4rl_file_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name, change in {"group": {"rewards": None}, "text": {"rewards": ["a"] * 6}}.items():
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            for key, values in rows(**change).items():
                file[key] = values
            if name == "group":
                file.create_group("rewards")
    with pytest.raises(DataError, match="group.hdf5: field 'rewards' is a group"):
        load(str(tmp_path / "group.hdf5"), None, None, None)
    with pytest.raises(DataError, match="text.hdf5: field 'rewards' needs real numbers, has type object"):
        load(str(tmp_path / "text.hdf5"), None, None, None)


def test_a_corrupt_chunk_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "bad.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in rows().items():
            file.create_dataset(key, data=values, chunks=values.shape, compression="gzip")
        chunk = file["rewards"].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    with pytest.raises(DataError, match="bad.hdf5: field 'rewards' cannot be read"):
        load(str(path), None, None, None)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    pytest.importorskip("ogbench")
    np.savez_compressed(tmp_path / "whole.npz", actions=np.random.default_rng(0).normal(size=500))
    whole = (tmp_path / "whole.npz").read_bytes()
    middle = len(whole) // 2
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", actions=np.array([None]))
    files = {
        "empty": b"",
        "short": whole[:middle],
        "changed": whole[:middle] + b"\xff" * 200 + whole[middle + 200 :],
        "one": (tmp_path / "one.npy").read_bytes(),
        "text": b"PK\x03\x04 and no archive",
        "objects": (tmp_path / "objects.npz").read_bytes(),
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.npz' (cannot be read|holds one array)"):
            load(str(path), "pointmaze-medium-navigate-singletask-task1-v0", None, None)


def test_a_minari_data_set_is_found_by_name_in_its_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari(tmp_path / "own" / "walk-v0", episode())
    assert load("own/walk-v0", None, None, None).digest() == load(f"{tmp_path}/own/walk-v0", None, None, None).digest()
    with pytest.raises(
        (ConfigError, DataError), match="'own/other-v0' (is no file or folder, nor in|cannot be fetched)"
    ):
        load("own/other-v0", None, None, None)
    with pytest.raises(DataError, match="'own/other' does not exist"):
        load("own/other", None, None, None)
