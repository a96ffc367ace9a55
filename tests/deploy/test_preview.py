"""The page that shows the dashboards without Grafana."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.faults.rig import until
from deploy.preview import DIRECTORY, Source, legend, main, number, preview
from tests.deploy.test_cluster import free_port

PANELS = sum(len(json.loads(path.read_text())["panels"]) for path in DIRECTORY.glob("*.json"))


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.5, "percentunit", "50%"),
        (12.0, "percent", "12%"),
        (0.0, "s", "0 s"),
        (0.0025, "s", "2.5 ms"),
        (4e-6, "s", "4 µs"),
        (90.0, "s", "90 s"),
        (1500.0, "ops", "1.5 k/s"),
        (2.5e9, "bytes", "2.5 GB"),
        (3.0, "decmbytes", "3 MB"),
        (1e6, "Bps", "1 MB/s"),
        (-7.0, "none", "-7"),
    ],
)
def test_values_are_shown_in_their_units(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_legends_take_labels_and_leave_out_what_is_missing() -> None:
    assert legend("{{role}} {{ slot }}!{{none}}", {"role": "actor", "slot": "3"}) == "actor 3!"


def test_a_mark_is_where_something_began() -> None:
    source = Source("http://127.0.0.1:1", 0.0, 240.0, ".*")
    assert source.beginnings([5.0, 6.0, 7.0, 50.0, 51.0]) == [5.0, 50.0]
    assert source.beginnings([]) == []


def test_without_a_prometheus_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["--prometheus", f"http://127.0.0.1:{free_port()}", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "no Prometheus answers at" in said.out + said.err and not out.exists()


def test_a_gap_is_not_drawn_as_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    series = {"metric": {"slot": "1"}, "values": [[0, "1"], [1, "2"], [30, "3"]]}
    monkeypatch.setattr(Source, "ask", lambda self, query: [series])
    source = Source("http://127.0.0.1:1", 0.0, 240.0, ".*")
    (curve,) = source.curves({"expr": "x", "legendFormat": "{{slot}}"})
    assert curve.name == "1" and curve.times == [0.0, 1.0, 2.0, 30.0]
    assert [value == value for value in curve.values] == [True, True, False, True]


@pytest.mark.integration
def test_every_panel_is_drawn_in_its_place(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    address = f"127.0.0.1:{free_port()}"
    config = tmp_path / "prometheus.yml"
    scrape = {"job_name": "self", "static_configs": [{"targets": [address]}]}
    config.write_text(
        json.dumps({"global": {"scrape_interval": "250ms", "scrape_timeout": "200ms"},
                    "scrape_configs": [scrape]})
    )  # fmt: skip
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: _answers(address), 30)
        end = time.time()
        page = preview(Source(f"http://{address}", end - 60, end, ".*"))
    finally:
        server.kill()
        server.wait()
    assert page.count("<svg") == PANELS == page.count('class="panel"')
    # Prometheus itself is a process with metrics, and nothing else is there.
    assert 0 < page.count("no data") < PANELS
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")


def _answers(address: str) -> bool:
    end = time.time()
    source = Source(f"http://{address}", end - 60, end, ".*")
    try:
        return bool(source.ask("up == 1"))
    except RuntimeError:
        return False
