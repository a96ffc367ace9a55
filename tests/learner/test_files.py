import json
from pathlib import Path

from learner.files import JsonLines, read_rows, write_atomically


def test_rows_are_appended_across_openings(tmp_path: Path) -> None:
    for value in (1, 2):
        lines = JsonLines(tmp_path / "rows.jsonl")
        lines.write({"value": value})
        lines.close()
    assert read_rows(tmp_path / "rows.jsonl") == [{"value": 1}, {"value": 2}]


def test_a_torn_last_row_is_ignored_and_then_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"value": 1}\n{"val')
    assert read_rows(path) == [{"value": 1}]
    lines = JsonLines(path)
    lines.write({"value": 2})
    lines.close()
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 2]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.write({"value": float("nan"), "other": float("inf")})
    lines.close()
    assert read_rows(tmp_path / "rows.jsonl") == [{"value": None, "other": None}]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.jsonl") == []


def test_an_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "status.json", b"old")
    write_atomically(tmp_path / "status.json", b"new")
    assert (tmp_path / "status.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
