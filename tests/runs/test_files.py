"""Files that survive a kill, and output folders that are tried before the work starts."""

from __future__ import annotations

import json
import os

import pytest

from vgf_llm.console.progress import track
from vgf_llm.errors import DataError, NonFiniteError, OutputError
from vgf_llm.runs.files import append_jsonl, check_writable, read_jsonl, write_json_atomic


def test_check_writable_creates_the_folder_and_leaves_it_empty(tmp_path):
    folder = check_writable(tmp_path / "a" / "b")
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_check_writable_refuses_a_file_and_a_folder_below_one(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match="taken' is a file"):
        check_writable(tmp_path / "taken")
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(tmp_path / "taken" / "below")


def test_check_writable_refuses_a_file_system_that_takes_no_files():
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable("/proc/self/vgf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_refuses_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path)


def test_write_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OutputError, match="nowhere"):
        write_json_atomic(tmp_path / "nowhere" / "a.json", {})


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"text": "zwei\nZeilen \u2028 é"}])
    append_jsonl(path, [{"a": 3}])
    assert read_jsonl(path) == [{"a": 1}, {"text": "zwei\nZeilen \u2028 é"}, {"a": 3}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_torn_last_line_is_dropped_reported_and_written_over(tmp_path, capsys, cut):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"b": 22}])
    path.write_bytes(path.read_bytes()[:-cut])
    whole = cut == 1  # only the newline is gone: the row itself is there
    expected = [{"a": 1}, {"b": 22}] if whole else [{"a": 1}]
    assert read_jsonl(path) == expected
    assert ("dropped a torn last line (row 2" in capsys.readouterr().err) is not whole
    append_jsonl(path, [{"c": 3}])
    assert read_jsonl(path) == [*expected, {"c": 3}]
    assert capsys.readouterr().err == ""


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"long": "x" * 200_000}])
    path.write_bytes(path.read_bytes()[:-2])
    append_jsonl(path, [{"c": 3}])
    assert read_jsonl(path) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize(
    ("middle", "expected"), [("{torn", "row 2: not JSON"), ("[1]", "row 2: expected a JSON object")]
)
def test_a_bad_line_inside_the_file_is_an_error(tmp_path, middle, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + middle + '\n{"a": 3}\n')
    with pytest.raises(DataError, match=expected):
        read_jsonl(path)


def test_a_missing_file_is_named_and_an_empty_one_is_empty(tmp_path):
    with pytest.raises(DataError, match="none.jsonl' does not exist"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert read_jsonl(tmp_path / "empty.jsonl") == []


def test_track_yields_everything_and_keeps_standard_output_free(capsys):
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert list(track((n for n in "ab"), "letters")) == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""  # short work says nothing in a log


def test_non_finite_error_knows_its_prompt_and_step():
    error = NonFiniteError("value is nan", group=3, step=1)
    assert (error.group, error.step, str(error)) == (3, 1, "value is nan")
