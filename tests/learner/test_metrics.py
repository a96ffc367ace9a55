import math
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.bound import PHASES
from learner.metrics import Board, Exporter, GpuMemory
from replay_service import ReplayConfigError


def scrape(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {"/".join([s.name, *s.labels.values()]): s.value for s in samples}


def test_the_endpoint_serves_gauges_and_counters() -> None:
    exporter = Exporter("abc")
    port = exporter.serve(0)
    try:
        for total in (5, 9):
            exporter.update({"fence": 2, "episode_return": 0.0}, {"updates": total})
        assert math.isnan(scrape(port)["dreamer_entropy_nats"])  # no update yet, which is not 0
        exporter.train({"loss/rec": 1.5, "entropy_nats": 0.7, "prototypes/live": 3.0})
        exporter.train({"grad_norm": 2.5, "grad_norm/rssm": 1.5, "kl_nats/dyn": 0.5})
        exporter.train({"lr/actor": 3e-5, "return_percentile/95": 8.0, "value_percentile/5": -8.0})
        exporter.phases(dict.fromkeys(PHASES, 0.0) | {"update": 2.5})
        found = scrape(port)
    finally:
        exporter.close()
    assert found["dreamer_fence"] == 2
    assert found["dreamer_episode_return"] == 0.0
    assert math.isnan(found["dreamer_eval_return"])  # no episode yet, which is not 0
    assert found["dreamer_updates_total"] == 9
    assert found["dreamer_loss/rec"] == 1.5
    assert found["dreamer_entropy_nats"] == pytest.approx(0.7)
    assert (found["dreamer_grad_norm/all"], found["dreamer_grad_norm/rssm"]) == (2.5, 1.5)
    assert found["dreamer_kl_nats/dyn"] == 0.5 and found["dreamer_lr/actor"] == 3e-5
    percentiles = found["dreamer_return_percentile/95"], found["dreamer_value_percentile/5"]
    assert percentiles == (8.0, -8.0)
    assert found["dreamer_train_metric/prototypes/live"] == 3.0
    assert found["dreamer_step_seconds_total/update"] == 2.5
    assert found[f"dreamer_build_info/abc/{version('dreamfleet')}"] == 1
    # Of the GPU's memory there is nothing to say until torch uses one.
    memory = {name for name in found if name.startswith("dreamer_gpu_memory_bytes")}
    assert bool(memory) == torch.cuda.is_initialized()


def test_a_port_in_use_is_an_error() -> None:
    first = Exporter()
    port = first.serve(0)
    try:
        taken = f"port {port} of --learner.metrics-port is in use"
        with pytest.raises(ReplayConfigError, match=taken):
            Exporter().serve(port)
    finally:
        first.close()


def test_curves_and_animations_reach_tensorboard(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.scalars({"loss/rec": 2.0}, 64)
    board.animation("open_loop/image", b"GIF89a", (30, 20), 64)
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss/rec")] == [(64, 2.0)]
    image = events.Images("open_loop/image")[0]
    assert (image.width, image.height, image.encoded_image_string) == (30, 20, b"GIF89a")


@pytest.mark.cuda
def test_memory_of_the_gpu_is_what_torch_says() -> None:
    kept = torch.zeros(2**20, device="cuda")
    (family,) = GpuMemory().collect()
    found = {sample.labels["kind"]: sample.value for sample in family.samples}
    assert found["allocated"] == torch.cuda.memory_allocated() >= kept.nbytes
    assert found["reserved"] >= found["allocated"] and found["peak"] >= found["allocated"]
