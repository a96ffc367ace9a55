"""The page on agents: the agent it adds trains, and no code asks for one by name."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from dreamer.agent import make_agent
from dreamer.presets import AGENTS, agent_config
from tests.dreamer.cases import TURN, VECTOR, batch_of

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "agents.md").read_text()
FILES = sorted({known.build.partition(":")[0] for known in AGENTS.values()})
MOST_AGENT_LINES = 200


@pytest.mark.parametrize("module", FILES)
def test_every_agent_reads_in_one_short_file(module: str) -> None:
    text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert text.count("\n") <= MOST_AGENT_LINES


def test_no_code_asks_for_an_agent_by_name() -> None:
    names = "|".join(map(re.escape, AGENTS))
    asked = re.compile(rf"""(==|!=|\bin\b)\s*\(?["']({names})["']|\.startswith\(["'](v\d|pro)""")
    for folder in ("dreamer", "learner", "actors", "replay_service", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            found = asked.search(path.read_text())
            assert found is None, (path, found)


def test_the_agent_that_the_page_adds_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, entry = re.findall(r"```python\n# [^\n]*\n(.*?)```", PAGE, re.DOTALL)
    assert len(module.splitlines()) + len(entry.splitlines()) < 60
    path = tmp_path / "curious.py"
    path.write_text(module)
    spec = importlib.util.spec_from_file_location("dreamer.curious", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dreamer.curious", made)
    spec.loader.exec_module(made)
    try:
        exec(f"from dreamer.presets import *; from dataclasses import replace\n{entry}", {})
        torch.manual_seed(0)
        agent = make_agent(agent_config("curious", "debug"), VECTOR, TURN)
        metrics, _ = agent.update(batch_of(agent))
    finally:
        AGENTS.pop("curious", None)
    assert type(agent).__name__ == "Curious" and metrics["curiosity_nats"] > 0
    assert all(torch.isfinite(value) for value in metrics.values())
