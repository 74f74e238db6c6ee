"""Files that take the place of others together: a kill at any of the moves leaves the old ones or the new ones."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from vgf_llm.errors import OutputError
from vgf_llm.runs import result
from vgf_llm.runs.result import replaced, settle

OLD = {
    "config.json": "old",
    "adapter.bin": "old",
    "card.json": "old",
    "notes.txt": "mine",
    "templates/rag.jinja": "old",
    "templates/old.jinja": "old",
    "value/model.bin": "old",
}
NEW = {"config.json": "new", "model.bin": "new", "notes.txt": "mine", "templates/rag.jinja": "new"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs, but the clean-up of the block, which a kill would not do either."""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in found.items() if not name.startswith(".result")}


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def stale(folder: Path) -> list[str]:
    return [name for name in ("config.json", "adapter.bin", "card.json", "value") if (folder / name).exists()]


def replace(folder: Path) -> None:
    with replaced(folder, "config.json", stale) as staging:
        write(staging, {"config.json": "new", "model.bin": "new", "templates/rag.jinja": "new"})


def test_new_files_take_the_place_of_old_ones_and_leave_others_alone(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    replace(tmp_path)
    assert read(tmp_path) == NEW and folders(tmp_path) == ["templates"]
    replace(tmp_path)
    assert read(tmp_path) == NEW and folders(tmp_path) == ["templates"]


def test_an_error_while_writing_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    with pytest.raises(KeyError), replaced(tmp_path, "config.json", stale) as staging:
        write(staging, {"config.json": "new"})
        raise KeyError
    assert read(tmp_path) == OLD and folders(tmp_path) == ["templates", "value"]


def test_a_kill_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes the disk is killed before it happens, until one whole pass has none left."""
    real = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "mkdir")}
    real["rmtree"] = shutil.rmtree
    outcomes = []
    for deadly in range(1, 100):
        folder, calls = tmp_path / str(deadly), []

        def spied(name: str, calls: list[str] = calls, deadly: int = deadly):
            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) >= deadly:
                    raise Killed
                return real[name](*args, **kwargs)

            return call

        write(folder, OLD)
        for name in real:
            monkeypatch.setattr(shutil if name == "rmtree" else os, name, spied(name))
        try:
            replace(folder)
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.undo()
        settle(folder)  # what any reader does first
        outcomes.append(read(folder))
        assert read(folder) in (OLD, NEW), (deadly, calls)
        replace(folder)
        assert read(folder) == NEW and folders(folder) == ["templates"]
    assert OLD in outcomes and NEW in outcomes and len(outcomes) > 4


def test_until_it_is_settled_the_folder_has_not_the_file_without_which_it_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For readers that know nothing of the moves: never an old configuration beside new weights."""
    write(tmp_path, OLD)

    moved = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(source).name == "model.bin":
            raise Killed
        moved(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        replace(tmp_path)
    assert "config.json" not in read(tmp_path)


def test_a_folder_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, OLD)

    def refuse(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result.os, "rename", refuse)
    with pytest.raises(OutputError, match=rf"'{tmp_path}' cannot be put in place \(No space left on device\)"):
        replace(tmp_path)
    assert read(tmp_path) == OLD


@pytest.fixture
def half_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose run was killed before the first move."""
    write(tmp_path, OLD)

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(result, "_move", killed)
        with pytest.raises(Killed):
            replace(tmp_path)
    assert (tmp_path / ".result").is_dir()
    return tmp_path


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOSYS, errno.ENOLCK])
def test_where_the_file_system_does_not_lock_it_is_settled_all_the_same(
    half_moved: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """NFS refuses a descriptor that is not open for writing, some mounts refuse every lock."""

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(result.fcntl, "flock", refuse)
    settle(half_moved)
    assert read(half_moved) == NEW and folders(half_moved) == ["templates"]


def test_what_is_locked_is_a_file_open_for_writing(half_moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def seen(descriptor: int, operation: int) -> None:
        modes.append(os.fstat(descriptor).st_mode)
        os.write(descriptor, b"")  # EBADF where it is read-only

    monkeypatch.setattr(result.fcntl, "flock", seen)
    settle(half_moved)
    assert [stat.S_ISREG(mode) for mode in modes] == [True]


def test_a_reader_on_a_read_only_mount_says_what_is_left(half_moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("open", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(OutputError, match=r"cannot be put in place \(Read-only file system\); make the folder"):
        settle(half_moved)
    monkeypatch.undo()
    settle(half_moved)
    assert read(half_moved) == NEW
