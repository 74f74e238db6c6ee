"""Files of rows in the formats that people have, each written by a function of a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def jsonl(*rows: dict, name: str = "data.jsonl") -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def text(content: str, name: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    return write


def separated(delimiter: str, name: str, cell: Callable[[Any], str], row: dict) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        with (folder / name).open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(row), delimiter=delimiter)
            writer.writeheader()
            writer.writerow({key: cell(value) for key, value in row.items()})
        return str(folder / name)

    return write


def parquet(row: dict) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "data.parquet")
        return str(folder / "data.parquet")

    return write


def arrow(row: dict) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        import pyarrow

        table = pyarrow.Table.from_pylist([row])
        with pyarrow.ipc.new_file(str(folder / "data.arrow"), table.schema) as sink:
            sink.write_table(table)
        return str(folder / "data.arrow")

    return write


def saved(row: dict, split: str | None = None) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        import datasets

        data = datasets.Dataset.from_list([row])
        if split is None:
            data.save_to_disk(folder / "saved")
            return str(folder / "saved")
        other = datasets.Dataset.from_list([{key: "other" for key in row}])
        datasets.DatasetDict({"train": other, "test": data}).save_to_disk(folder / "saved")
        return f"{folder / 'saved'}:{split}"

    return write


def shards(row: dict, source: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        jsonl(row, name="hub/data/train-00000-of-00002.jsonl")(folder)
        jsonl(row, name="hub/data/train-00001-of-00002.jsonl")(folder)
        jsonl({key: "other" for key in row}, name="hub/data/test-00000-of-00001.jsonl")(folder)
        return str(folder / source)

    return write
