"""Files that take the place of others together: a kill at any of the moves leaves the old ones or the new ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vgf_llm.errors import OutputError
from vgf_llm.runs import result
from vgf_llm.runs.result import replaced, settle

OLD = {"config.json": "old", "adapter.bin": "old", "card.json": "old", "notes.txt": "mine"}
NEW = {"config.json": "new", "model.bin": "new", "notes.txt": "mine"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs, but the clean-up of the block, which a kill would not do either."""


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def stale(folder: Path) -> list[str]:
    return [name for name in ("config.json", "adapter.bin", "card.json") if (folder / name).exists()]


def replace(folder: Path) -> None:
    with replaced(folder, "config.json", stale) as staging:
        write(staging, {"config.json": "new", "model.bin": "new"})


def test_new_files_take_the_place_of_old_ones_and_leave_others_alone(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    replace(tmp_path)
    assert read(tmp_path) == NEW
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_an_error_while_writing_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    with pytest.raises(KeyError), replaced(tmp_path, "config.json", stale) as staging:
        write(staging, {"config.json": "new"})
        raise KeyError
    assert read(tmp_path) == OLD and [path for path in tmp_path.iterdir() if path.is_dir()] == []


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
        assert read(folder) == NEW
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
