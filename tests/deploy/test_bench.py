from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.table import Table

from deploy.bench import BENCHMARKS, BenchOptions, bench
from deploy.config import ConfigError


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put a benchmark of our own beside the real ones."""
    module = ModuleType("benchmarks.learner")

    def run(*, quick: bool = False) -> dict[str, Any]:
        return {"quick": quick, "ms": 1.5}

    def table(result: dict[str, Any]) -> list[list[str]]:
        return [["what", "ms"], ["toy", str(result["ms"])]]

    module.run, module.table = run, table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.learner", module)
    return module


def test_numbers_are_kept_with_the_machine_they_were_measured_on(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    assert bench(BenchOptions(what="learner", json=file, quick=True)) == 0
    kept = json.loads(file.read_text())
    assert (kept["learner"]["ms"], kept["learner"]["quick"]) == (1.5, True)
    assert kept["machine"]["cores"] >= 1 and kept["machine"]["torch"]
    said = capsys.readouterr().out
    assert 0 <= said.find("measuring learner") < said.find("toy")


def test_tables_that_are_drawn_already_are_shown_as_they_are(
    toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(result: dict[str, Any]) -> Table:
        table = Table("mine")
        table.add_row("as it is")
        return table

    toy.table = drawn  # type: ignore[attr-defined]
    bench(BenchOptions(what="learner"))
    assert "as it is" in capsys.readouterr().out


def test_file_in_a_missing_folder_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        BenchOptions(json=tmp_path / "missing" / "out.json")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_run_and_shown(name: str) -> None:
    import importlib

    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.run) and callable(module.table)
