"""The agents that contrast states with embeddings: losses by plain loops, and where they lead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer import ops
from tests.dreamer.cases import PUSH, VECTOR, close, tensor
from tests.dreamer.test_earlier import batch_of, build

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
def test_the_embedding_is_a_target_and_the_encoder_learns_through_the_posterior(name: str) -> None:
    agent: Any = build(name, VECTOR, PUSH)
    batch = batch_of(agent)
    rollout = agent.observe(batch)
    losses, _ = agent.representation_losses(batch, rollout)
    (loss,) = losses.values()
    params = dict(agent.named_parameters())
    trained = {k: p for k, p in params.items() if p.requires_grad}
    grads = torch.autograd.grad(
        loss.sum(), [*trained.values(), rollout.embed], retain_graph=True, allow_unused=True
    )
    moved = {k.split(".")[0] for k, g in zip(trained, grads[:-1], strict=True) if g is not None}
    assert moved == {"encoder", "rssm", "projection"}
    # All that reaches the embedding comes back through the states.
    through = torch.autograd.grad(
        rollout.states.feature(), rollout.embed, _gradient_of_states(agent, rollout)
    )[0]
    close(grads[-1], through, rtol=1e-4, atol=1e-7)


def _gradient_of_states(agent: Any, rollout: Any) -> Tensor:
    feature = rollout.states.feature().detach().requires_grad_()
    predicted = agent.projection(feature).flatten(0, 1)
    target = rollout.embed.detach().flatten(0, 1)
    if "barlow" in agent.objective_names:
        loss = ops.barlow_twins(predicted, target, agent.config.redundancy)
    else:
        loss = ops.info_nce(ops.pair_logits(predicted, target)).sum()
    return torch.autograd.grad(loss, feature)[0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_decoded_and_the_published_weight_is_used(name: str) -> None:
    agent: Any = build(name)
    assert agent.decoder is None
    metrics, _ = agent.update(batch_of(agent))
    assert not any("rec" in key.split("/")[-1] for key in metrics), sorted(metrics)
    assert agent.scale(agent.objective_names[0]) == {"r2": 0.05, "infonce": 1.0}[name]
    assert agent.scale("dyn") == 1.0 and agent.scale("rep") == 0.1
    assert agent.projection.bias is None
