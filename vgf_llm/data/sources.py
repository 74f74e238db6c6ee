"""Names of data to the files that hold them: one file, a glob, a folder of shards, or what ``save_to_disk`` wrote.

A folder's files belong to a split where their names say so (``train-00000-of-00002.parquet``, ``test.jsonl``,
``data/validation/part.csv``), as on the hub. ``folder:split`` names one.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vgf_llm.errors import DataError
from vgf_llm.runs.files import shorten

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
_NOT_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}


@dataclass(frozen=True)
class Files:
    """Local files of a source.

    Attributes:
        paths: In the order in which they are read.
        many: Whether a row's number must say which file it is in.
    """

    paths: list[Path]
    many: bool


def file_kind(name: str) -> str:
    """Return the suffix that says how a file is read, without ``.gz``."""
    return Path(name.removesuffix(".gz")).suffix.lower()


def local_files(source: str, split: str) -> Files | None:
    """Return the local files of a source, or None for a name of the hub.

    Args:
        source: a file, a glob, or a folder, the last with ``:split`` at its end where it has several.
        split: split of a folder whose name does not state one.

    Raises:
        DataError: nothing is there, or a folder has no such split.
    """
    expanded = str(Path(source).expanduser()) if source.startswith("~") else source
    path = Path(expanded)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # longer than a file's name may be, or with a null byte
        raise DataError(f"'{shorten(source)}' is not a file or data set ({error}); name one") from error
    if path.is_file():
        return Files([path], many=False)
    if path.is_dir():
        return Files(_in_folder(path, split, stated=False), many=True)
    if there:
        raise DataError(f"'{source}' is a pipe or device, not a file or folder; save it as a file first")
    name, colon, stated = expanded.rpartition(":")
    if colon and Path(name).is_dir():
        return Files(_in_folder(Path(name), stated, stated=True), many=True)
    if colon and Path(name).is_file():
        raise DataError(f"'{source}': a file has no splits; name '{name}'")
    if any(mark in expanded for mark in "*?["):
        found = sorted(Path(one) for one in glob.glob(expanded, recursive=True) if Path(one).is_file())
        if not found:
            raise DataError(f"'{source}' matches no file (current folder: {Path.cwd()})")
        return Files(_readable(found, source), many=True)
    if file_kind(expanded) in SUFFIXES or expanded.startswith((".", "/")):
        raise DataError(f"'{source}' does not exist (current folder: {Path.cwd()})")
    return None


def _in_folder(folder: Path, split: str, *, stated: bool) -> list[Path]:
    """Return the data files of one split of a folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = [one.name for one in sorted(folder.iterdir()) if (one / "state.json").is_file()]
        return _saved(folder / _chosen(split, splits, folder))
    if (folder / "state.json").is_file():
        if stated:
            raise DataError(f"'{folder}' holds one data set without splits; name it without ':{split}'")
        return _saved(folder)
    files = [
        one
        for one in sorted(folder.rglob("*"))
        if one.is_file()
        and one.name not in _NOT_DATA
        and file_kind(one.name) in SUFFIXES
        and not any(part.startswith((".", "_")) for part in one.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"'{folder}' has no data files; their names end in {', '.join(SUFFIXES)}, each also with .gz")
    by_split: dict[str | None, list[Path]] = {}
    for one in files:
        by_split.setdefault(_split_of(one.relative_to(folder)), []).append(one)
    if set(by_split) == {None}:
        if stated:
            names = ", ".join(one.name for one in files[:5])
            raise DataError(f"'{folder}' has no split '{split}': no file's name says one ({names}); drop ':{split}'")
        return _readable(files, str(folder))
    named = {name: found for name, found in by_split.items() if name is not None}
    return _readable(named[_chosen(split, list(named), folder)], str(folder))


def _chosen(split: str, splits: Sequence[str], folder: Path) -> str:
    """Return the split of a folder that is asked for; the only one where there is but one."""
    for name in (split, _SPLITS.get(split, split)):
        if name in splits:
            return name
    raise DataError(
        f"'{folder}' has no split '{split}'; it has {', '.join(splits) or 'none'}: name one as '{folder}:SPLIT'"
    )


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name, or one of its folders, says it belongs to."""
    for part in (path.name, *reversed(path.parts[:-1])):
        for word in re.split(r"[-_. ]", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _saved(folder: Path) -> list[Path]:
    """Return the Arrow files of a data set that ``datasets`` saved to disk."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / one["filename"] for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{folder}': its state.json cannot be read ({error}); save the data set again") from error
    if state.get("_indices_data_files"):
        raise DataError(f"'{folder}' was saved with an index of rows; call flatten_indices() and save it again")
    return files


def _readable(files: list[Path], source: str) -> list[Path]:
    """Refuse files of several kinds: they are not shards of one data set."""
    kinds = sorted({file_kind(one.name) for one in files})
    if len(kinds) > 1 or kinds[0] not in SUFFIXES:
        raise DataError(
            f"'{source}' holds files of several kinds or unknown ones ({', '.join(kinds)}); name a file, or a glob of "
            f"one kind; known are {', '.join(SUFFIXES)}"
        )
    return files
