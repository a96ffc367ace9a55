"""Hundreds of random faults in one run: nothing acknowledged is lost, torn or doubled."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.soak import Soak

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.timeout(900)]


def test_five_hundred_random_faults_lose_nothing(tmp_path: Path) -> None:
    soak = Soak(tmp_path, faults=500, seconds=600, seed=1, rare_every_s=0.5)
    try:
        report = soak.run()
    finally:
        soak.rig.close()
    assert report["faults"] >= 500, report
    assert report["acknowledged_chunks"] > 100, report
    for nothing in ("missing", "problems", "violations", "lost_chunks"):
        assert not report[nothing], report
