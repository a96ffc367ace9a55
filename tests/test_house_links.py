"""Links from the documentation into code lead to what they name, in every row about the agents.

Numbers of those rows that presets and sizes know are theirs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from deploy.presets import preset
from dreamer.agent import make_agent
from dreamer.config import V3Config
from dreamer.earlier import V1Config, V2Config, V3Of2023Config
from dreamer.presets import agent_config
from dreamer.spaces import (
    ActionSpace,
    BoxAction,
    DiscreteAction,
    ImageSpec,
    ObsSpace,
    VectorSpec,
)
from tests.links import LINK, PAGES, ROOT, renumbered, unknown

PAGE = (ROOT / "docs" / "agents.md").read_text()
AGENTS = {"V1": "V1", "V2": "V2", "V3 of 2023": "V3 2023", "V3": "V3", "Pro": "Pro"}
"""Column of an agent → the name of its paper in links; its official code has " code" after that."""
HEADER = f"| part | {' | '.join(AGENTS)} | code |"
TABLES = re.findall(rf"{re.escape(HEADER)}\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE)
ROWS = {
    row[0]: row[1:]
    for row in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in "".join(TABLES).splitlines()
    )
}
SIX: ActionSpace = {"action": BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6)}
PUBLISHED = ["v1-dmc-vision", "v1-atari", "v2-dmc-vision", "v2-atari", "v2-crafter"]
PUBLISHED += ["v3-2023-dmc-vision", "v3-2023-atari", "v3-2023-atari100k", "v3-dmc-vision"]
PUBLISHED += ["v3-atari", "v3-atari100k", "v3-crafter", "pro-dmc-vision", "pro-atari"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_code_lead_to_the_line_of_their_symbol(page: Path) -> None:
    assert not unknown(page)
    assert page.read_text() == renumbered(page), "run `make links`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_line_names_a_symbol(page: Path) -> None:
    assert len(LINK.findall(page.read_text())) == page.read_text().count(".py#L")


def test_links_follow_code_that_moves(tmp_path: Path) -> None:
    page, code = tmp_path / "page.md", tmp_path / "code.py"
    code.write_text("A, B = 1, [a for a in ()]\n\nclass C:\n    x: int = 0\n    def f(self): ...\n")
    page.write_text("".join(f"[`{name}`](code.py#L9)" for name in ("B", "C", "C.x", "C.f", "a")))
    assert re.findall(r"#L(\d+)", renumbered(page)) == ["1", "3", "4", "5", "9"]
    assert unknown(page) == ["page.md: code.py defines no a"]


@pytest.mark.parametrize("part", ROWS)
def test_every_part_leads_to_its_code_and_its_equation(part: str) -> None:
    *agents, code = ROWS[part]
    assert LINK.search(code)
    for cell, paper in zip(agents, AGENTS.values(), strict=True):
        assert cell in ("none", "–") or re.search(rf"\]\[{paper}(?: code)?\]$", cell), cell


def test_every_reference_of_the_page_is_defined() -> None:
    used = set(re.findall(r"\[[^]]+\]\[([^]]+)\]", PAGE))
    defined = re.findall(r"(?m)^\[([^]]+)\]: https://\S+$", PAGE)
    assert used == set(defined) and len(defined) == len(set(defined))


def test_parts_in_which_the_papers_differ_are_there() -> None:
    wanted = {"latent", "deviation of a Gaussian", "initial weights", "KL", "free nats"}
    wanted |= {"reward that is learned", "discount γ", "states of a trajectory", "baseline"}
    assert wanted | {"batch × length", "evaluation"} <= set(ROWS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_have_the_numbers_of_the_presets(name: str) -> None:
    config = preset(name)
    agent, learner = config.agent, config.learner
    column = ["v1", "v2", "v3-2023", "v3", "pro"].index(agent.name)
    if isinstance(agent, V3Config):
        rates, rule = [agent.optim.lr], agent.behaviour
        discount = 1.0 - 1.0 / rule.discount_horizon
    else:
        assert isinstance(agent, V1Config | V2Config | V3Of2023Config)
        optim, rule = agent.optim, agent.imagination
        rates, discount = [optim.model_lr, optim.actor_lr, optim.critic_lr], rule.discount
    told = {
        "batch × length": f"{learner.batch_size} × {learner.batch_length}",
        "replayed steps per decision": f"{config.train_ratio:,g}",
        "before the first update": f"{config.replay.min_size_steps:,}",
        "learning rates: model, actor, critic": ", ".join(map(_short, rates)),
        "discount γ": "1 − 1/333" if discount == 1.0 - 1.0 / 333.0 else f"{discount:g}",
        "entropy bonus": _short(rule.entropy) if rule.entropy else "none",
    }
    assert {row: text for row, text in told.items() if text not in ROWS[row][column]} == {}


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


@pytest.mark.parametrize(
    ("agent", "size", "obs", "actions", "weights"),
    [
        ("v3", "1m", {"vector": VectorSpec(shape=(24,))}, SIX, "640,867"),
        ("v3", "1m", {"image": ImageSpec(shape=(64, 64, 3))}, SIX, "686,846"),
        (
            "v2",
            "atari",
            {"image": ImageSpec(shape=(64, 64, 1))},
            {"action": DiscreteAction(classes=18)},
            "22.2 million",
        ),
    ],
)
def test_sizes_are_the_published_ones(
    agent: str, size: str, obs: ObsSpace, actions: ActionSpace, weights: str
) -> None:
    with torch.device("meta"):
        made = make_agent(agent_config(agent, size), obs, actions)
    count = sum(param.numel() for param in made.parameters() if param.requires_grad)
    assert weights in (f"{count:,}", f"{count / 1e6:.1f} million")
    assert weights in PAGE
