"""The benchmarks of scaling, weights and metrics, run small."""

from __future__ import annotations

import pytest

from benchmarks import metrics, scaling, weights

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.mark.exhaustive
def test_scaling_keeps_the_train_ratio_and_measures_what_actors_can_do() -> None:
    result = scaling.run(quick=True)
    assert [(row["limited"], row["actors"]) for row in result["rows"]] == [
        (False, 1),
        (False, 2),
        (True, 1),
        (True, 2),
    ]
    for row in result["rows"]:
        # Steps arrive in chunks, of which one more or less may fall into the second measured.
        assert 0 <= row["env_steps_per_s"] <= row["ideal"] * 2
        assert 0.0 <= row["limiter_share"] <= 1.01
    assert len(scaling.table(result)) == 1 + len(result["rows"])


@pytest.mark.exhaustive
def test_scaling_spreads_actors_over_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # and back after the test
    result = scaling.run(counts=(3,), seconds=1.0, nodes=3)
    assert [row["by_node"] for row in result["rows"]] == [[1, 1, 1]] * 2


@pytest.mark.exhaustive
def test_weights_reach_every_reader_and_a_cache_asks_the_hub_once() -> None:
    result = weights.run(quick=True)
    rows = {(row["readers"], row["via"]): row for row in result["rows"]}
    assert set(rows) == {(1, "hub"), (1, "node"), (2, "hub"), (2, "node")}
    for (readers, via), row in rows.items():
        assert 0 < row["publish_ms"] and 0 < row["all_ms"]
        # Each asks once for each version, and once more for the next.
        asks = readers if via == "hub" else 1
        assert asks <= row["polls"] <= 2 * asks
    assert weights.policy_bytes("1m") < weights.policy_bytes("12m")
    assert len(weights.table(result)) == 5


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="growing numbers"):
        scaling.ScalingOptions(actors=(4, 2))
    with pytest.raises(ValueError, match="--rounds, --nodes and --readers"):
        weights.WeightsOptions(rounds=0)


def test_metrics_are_timed_against_what_they_belong_to() -> None:
    actor, learner = metrics.run(quick=True)["parts"]
    assert actor["every_ms"] < learner["every_ms"] == 5_000
    for part in (actor, learner):
        counting = part["count_us"] / part["every_ms"] / 1e3
        assert part["share"] == pytest.approx(counting + part["scrape_ms"] / 10_000)
        assert part["count_us"] > 0 and part["scrape_ms"] > 0
