"""The agents that contrast states with embeddings: losses by plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer import ops
from tests.dreamer.cases import batch_of, build, close, tensor

NAMES = ("r2", "infonce")


def rows(seed: int, count: int = 7, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def test_barlow_twins_by_loops() -> None:
    predicted, target = rows(0).tolist(), (2.0 * rows(1) + 5.0).tolist()
    count, width = 7, 3

    def standardised(x: list[list[float]]) -> list[list[float]]:
        out = [[0.0] * width for _ in range(count)]
        for i in range(width):
            column = [row[i] for row in x]
            mean = sum(column) / count
            std = math.sqrt(sum((v - mean) ** 2 for v in column) / (count - 1))
            for n in range(count):
                out[n][i] = (x[n][i] - mean) / (std + 1e-8)
        return out

    x, y = standardised(predicted), standardised(target)
    want = 0.0
    for i in range(width):
        for j in range(width):
            c = sum(x[n][i] * y[n][j] for n in range(count)) / count
            want += (c - 1.0) ** 2 if i == j else 0.25 * c**2
    close(ops.barlow_twins(tensor(predicted), tensor(target), 0.25), want)


def test_barlow_twins_of_equal_columns_is_what_the_unbiased_deviation_leaves() -> None:
    column = rows(2, 8, 1)
    close(ops.barlow_twins(column, 3.0 * column - 1.0, 5e-4), (1.0 / 8.0) ** 2, rtol=1e-5)


def test_info_nce_by_loops() -> None:
    predicted, target = rows(3).tolist(), rows(4).tolist()
    want = []
    for n, x in enumerate(predicted):
        scores = [sum(a * b for a, b in zip(x, y, strict=True)) for y in target]
        want.append(math.log(sum(math.exp(score) for score in scores)) - scores[n])
    logits = ops.pair_logits(tensor(predicted), tensor(target))
    close(ops.info_nce(logits), want)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_decoded_and_the_published_weight_is_used(name: str) -> None:
    agent: Any = build(name)
    assert agent.decoder is None
    metrics, _ = agent.update(batch_of(agent))
    assert not any("rec" in key.split("/")[-1] for key in metrics), sorted(metrics)
    assert agent.scale(agent.objective_names[0]) == {"r2": 0.05, "infonce": 1.0}[name]
    assert agent.scale("dyn") == 1.0 and agent.scale("rep") == 0.1
    assert agent.projection.bias is None
