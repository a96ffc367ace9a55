"""Agents are added without touching anything else: no code asks which one it has.

The agent that the page on agents adds trains.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from dreamer.agent import Agent, agent_class, make_agent
from dreamer.config import AgentConfig
from dreamer.presets import AGENTS, agent_config
from tests.dreamer.cases import TURN, VECTOR, batch_of
from tests.test_house import PACKAGES, ROOT, python_files

MAY_ASK = ("dreamer/presets.py", "deploy/presets/")
"""The registry of agents and that of presets: only there is the name of one a key."""
OTHER_MEANINGS = {("dreamer/contrast.py", "infonce")}
"""(file, text) where the name of an agent means something else: a loss."""
PARTS = (Agent, AgentConfig)
PAGE = (ROOT / "docs" / "agents.md").read_text()
FILES = sorted({known.build.partition(":")[0] for known in AGENTS.values()})
MOST_AGENT_LINES = 200


@pytest.mark.parametrize("module", FILES)
def test_every_agent_reads_in_one_short_file(module: str) -> None:
    text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert text.count("\n") <= MOST_AGENT_LINES


def literals(expression: ast.expr, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    """Yield the texts in an expression, those of the file's constants that it names too."""
    seen: set[str] = set()
    ahead: list[ast.AST] = [expression]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name) and node.id in constants and node.id not in seen:
            seen.add(node.id)
            ahead.append(constants[node.id])
        elif isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Starred | ast.BinOp):
            ahead += ast.iter_child_nodes(node)
        elif isinstance(node, ast.Call):  # frozenset({…}), tuple([…])
            ahead += node.args if isinstance(node.func, ast.Name) else []


def asked_about(node: ast.AST) -> tuple[Sequence[ast.expr | None], Callable[[str], bool]]:
    """Return what a piece of code compares, and which texts there are about an agent."""
    named = AGENTS.__contains__
    match node:
        case ast.Compare():
            texts = [node.left, *node.comparators]
            if isinstance(node.left, ast.Constant) and isinstance(node.ops[0], ast.In | ast.NotIn):
                # "2023" in name
                return texts, lambda text: len(text) > 1 and any(text in name for name in AGENTS)
            return texts, named
        case ast.MatchValue():
            return [node.value], named
        case ast.Dict() | ast.MatchMapping():
            return node.keys, named
        case ast.Subscript():
            return [node.slice], named
        case ast.Call(func=ast.Name(id="dict")):
            return [ast.Constant(word.arg) for word in node.keywords], named
        case ast.Call(func=ast.Attribute(attr="get" | "pop" | "setdefault" | "__eq__" | "index")):
            return node.args[:1], named
        case ast.Call(func=ast.Attribute(attr="startswith" | "removeprefix" | "partition")):
            return node.args[:1], lambda text: any(
                name.startswith(text) or text.startswith(f"{name}-") for name in AGENTS
            )
        case ast.Call(func=ast.Attribute(attr="endswith" | "removesuffix")):
            return node.args[:1], lambda text: any(name.endswith(text) for name in AGENTS)
    return (), named


def questions(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of whatever in a file depends on the name of an agent."""
    tree = ast.parse(text)
    constants: dict[str, ast.expr] = {}
    for line in tree.body:
        if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            constants |= {name.id: line.value for name in targets if isinstance(name, ast.Name)}
    for node in ast.walk(tree):
        asked, about_an_agent = asked_about(node)
        for expression in filter(None, asked):
            for found in literals(expression, constants):
                if about_an_agent(found):
                    yield getattr(node, "lineno", 0), found


@pytest.mark.parametrize(
    "code",
    [
        'agent.name == "v1"',
        '"pro" != agent.name',
        'a < b == "v3-2023"',
        'name in ("x", "v2")',
        'name not in {"r2"}',
        'name in frozenset(["infonce"])',
        '"2023" in name',
        'PRO = "pro"\nif name == PRO: pass',
        'EARLY: tuple[str, ...] = ("v1",)\nLATE = (*EARLY, "x")\nname in LATE',
        'match name:\n    case "x" | "v3": pass',
        'match options:\n    case {"v3": value}: pass',
        'size = {"v1": 1, "v2": 2}[name]',
        "size = dict(v1=1)[name]",
        'LOSSES["pro-v3"]',
        'LOSSES.get("v3", None)',
        'name.startswith("v3")',
        'name.startswith(("x", "pro-"))',
        'preset.startswith("v3-2023-dmc")',
        'name.removeprefix("pro-")',
        'name.endswith("2023")',
        "name.endswith('-v3')",
    ],
)
def test_a_question_for_an_agent_is_found_in_every_form(code: str) -> None:
    assert list(questions(code)), code


@pytest.mark.parametrize(
    "code",
    [
        'agent_config("v3", "12m")',
        'name: str = "v3"',
        'return "v3", "no preset is made for it"',
        'label.startswith("process-")',
        'kind == "v4"',
        'names = ["v1", "v2"]',
        '"on" == state',
    ],
)
def test_code_that_only_names_an_agent_is_not_a_question(code: str) -> None:
    assert not list(questions(f"def f():\n    {code}")), code


def test_no_code_asks_for_an_agent_by_name() -> None:
    wrong = []
    for path in python_files(*PACKAGES):
        file = path.relative_to(ROOT).as_posix()
        if file.startswith(MAY_ASK):
            continue
        for line, text in questions(path.read_text()):
            if (file, text) not in OTHER_MEANINGS:
                wrong.append(f"{file}:{line} asks for {text!r}")
    assert not wrong, wrong


def kinds_of(node: ast.AST) -> Sequence[ast.expr]:
    """Return the classes that a piece of code tells apart."""
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
            return [kinds]
        case ast.Compare(left=ast.Call(func=ast.Name(id="type"))):
            return node.comparators
        case ast.MatchClass():
            return [node.cls]
    return ()


def test_no_code_beside_the_agents_own_tells_them_apart_by_class() -> None:
    own: set[type] = {type(known.config) for known in AGENTS.values()}
    own |= {agent_class(name) for name in AGENTS}
    names = {kind.__name__ for each in own for kind in each.__mro__ if issubclass(kind, PARTS)}
    names -= {kind.__name__ for kind in PARTS}
    assert {"V1Config", "ProV3Config", "DreamerV3", "DreamerPro"} <= names
    wrong = [
        f"{path.relative_to(ROOT)}:{expression.lineno} asks for {named}"
        for path in python_files(*(package for package in PACKAGES if package != "dreamer"))
        for node in ast.walk(ast.parse(path.read_text()))
        for expression in kinds_of(node)
        for part in ast.walk(expression)
        if (named := getattr(part, "attr", getattr(part, "id", ""))) in names
    ]
    assert not wrong, f"ask the configuration or the agent instead: {wrong}"


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
