from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from replay_service import ReplayConfigError
from replay_service.pages import PageIndex, page_count
from replay_service.storage import (
    DeviceStorage,
    gather,
    last_of_each,
    window_rows,
    write_back,
)
from tests.replay_service.records import SCHEMA, columns

PAGE, WINDOW = 8, 11


def filled(tmp_path: Path, placement: str = "ram") -> tuple[DeviceStorage, PageIndex]:
    """Return storage with three interleaved streams, of which the oldest steps were evicted."""
    pages = page_count(300, PAGE)
    storage = DeviceStorage(
        SCHEMA,
        rows=pages * PAGE,
        pages=pages,
        placement=placement,
        device="cpu",
        directory=tmp_path,
    )
    index = PageIndex(
        pages=pages,
        page_steps=PAGE,
        window_steps=WINDOW,
        capacity_steps=300,
        next_page=storage.host_next_page,
        valid_cumsum=storage.host_cumsum,
    )
    for seq in range(1, 31):
        for slot in range(3):
            first, done = (seq - 1) * 5, 0
            made = columns(slot, first, 5)
            for row, count in index.place(f"s{slot}", seq, first, 5):
                storage.write(row, {k: v[done : done + count] for k, v in made.items()})
                done += count
    index.refresh()
    storage.publish_index()
    return storage, index


def sample(storage: DeviceStorage, count: int, seed: int = 0, length: int = WINDOW) -> torch.Tensor:
    uniforms = torch.from_numpy(np.random.default_rng(seed).random(count))
    nothing = torch.full((count,), -1)
    return window_rows(uniforms, nothing, storage.valid_cumsum, storage.next_page, PAGE, length)


@pytest.mark.parametrize("placement", ["ram", "disk"])
def test_windows_hold_consecutive_records_of_one_stream(tmp_path: Path, placement: str) -> None:
    storage, _ = filled(tmp_path, placement)
    batch = gather(storage.columns, sample(storage, 500))
    assert (batch["step"].diff(dim=1) == 1).all()
    assert (batch["slot"].diff(dim=1) == 0).all()
    assert (batch["image"][..., 0, 0, 0] == batch["step"] % 256).all()
    assert (batch["is_first"][:, 1:].any(dim=1)).any(), "windows may cross episodes"
    assert list(tmp_path.iterdir()) == [], "the mapped file has no name"


def test_every_valid_start_is_equally_likely(tmp_path: Path) -> None:
    storage, index = filled(tmp_path)
    draws = 200_000
    rows = sample(storage, draws)[:, 0].numpy()
    counts = np.bincount(rows, minlength=len(storage.columns["step"]))
    per_page = np.diff(storage.host_cumsum, prepend=0)
    valid = [page * PAGE + i for page, n in enumerate(per_page) for i in range(int(n))]
    assert counts.sum() == counts[valid].sum() == draws
    assert len(valid) == index.valid_starts
    assert stats.chisquare(counts[valid]).pvalue > 1e-3


def test_first_and_last_random_number_stay_inside(tmp_path: Path) -> None:
    storage, _ = filled(tmp_path)
    edges = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    rows = window_rows(
        edges, torch.tensor([-1, -1]), storage.valid_cumsum, storage.next_page, PAGE, WINDOW
    )
    batch = gather({"step": storage.columns["step"]}, rows)
    assert (batch["step"].diff(dim=1) == 1).all()


def test_explicit_starts_take_precedence(tmp_path: Path) -> None:
    storage, _ = filled(tmp_path)
    start = sample(storage, 1)[0, 0]
    rows = window_rows(
        torch.rand(2, dtype=torch.float64),
        torch.stack([start, torch.tensor(-1)]),
        storage.valid_cumsum,
        storage.next_page,
        PAGE,
        WINDOW,
    )
    assert rows[0, 0] == start and rows.shape == (2, WINDOW)


def test_gather_into_given_tensors_equals_gather(tmp_path: Path) -> None:
    storage, _ = filled(tmp_path)
    rows = sample(storage, 7)
    want = gather(storage.columns, rows)
    out = {name: torch.empty_like(value) for name, value in want.items()}
    got = gather(storage.columns, rows, out)
    assert all(got[name] is out[name] and torch.equal(out[name], want[name]) for name in want)


def test_write_back_replaces_rows_and_nothing_else(tmp_path: Path) -> None:
    storage, _ = filled(tmp_path)
    bits = storage.columns["deter"].view(torch.int16)
    before = bits.clone()
    rows = sample(storage, 2)
    write_back(storage.columns, rows, {"deter": torch.full((2, WINDOW, 4), 7, dtype=torch.half)})
    changed = (bits != before).any(dim=1).nonzero().flatten()
    assert set(changed.tolist()) == set(rows.flatten().tolist())


def test_the_last_place_of_every_row_is_found() -> None:
    rows = torch.tensor([4, 2, 4, 7, 2, 4])
    assert last_of_each(rows).tolist() == [5, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_of_a_row_in_two_windows_the_last_value_stays(device: str) -> None:
    rows = torch.randint(0, 50, (16, 64), device=device)
    values = torch.arange(16 * 64, device=device).reshape(16, 64, 1).expand(16, 64, 512).float()
    columns = {"deter": torch.zeros(50, 512, device=device)}
    write_back(columns, rows, {"deter": values})
    want = {row: place for place, row in enumerate(rows.flatten().tolist())}
    assert all(bool((columns["deter"][row] == place).all()) for row, place in want.items())


def test_too_large_a_mirror_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    for placement in ("ram", "disk", "auto"):
        with pytest.raises(ReplayConfigError, match="the mirror needs .* lower capacity_steps"):
            DeviceStorage(
                SCHEMA,
                rows=2**45,
                pages=1,
                placement=placement,
                device="cpu",
                directory=tmp_path,
            )
    with pytest.raises(ReplayConfigError, match="device is cpu"):
        DeviceStorage(SCHEMA, rows=8, pages=1, placement="cuda", device="cpu", directory=tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sampling_can_be_captured_and_sees_later_inserts(tmp_path: Path) -> None:
    pages = page_count(300, PAGE)
    storage = DeviceStorage(
        SCHEMA, rows=pages * PAGE, pages=pages, placement="cuda", device="cuda", directory=None
    )
    index = PageIndex(
        pages=pages,
        page_steps=PAGE,
        window_steps=WINDOW,
        capacity_steps=300,
        next_page=storage.host_next_page,
        valid_cumsum=storage.host_cumsum,
    )

    def insert(slot: int) -> None:
        for row, count in index.place(f"s{slot}", 1, 0, 8) + index.place(f"s{slot}", 2, 8, 8):
            first = 0 if row % (2 * PAGE) == 0 else 8
            storage.write(row, columns(slot, first, count))
        index.refresh()
        storage.publish_index()

    insert(0)
    uniforms = torch.rand(64, dtype=torch.float64, device="cuda")
    nothing = torch.full((64,), -1, device="cuda")

    def draw() -> torch.Tensor:
        rows = window_rows(uniforms, nothing, storage.valid_cumsum, storage.next_page, PAGE, WINDOW)
        return gather({"slot": storage.columns["slot"]}, rows)["slot"]

    draw()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = draw()
    insert(1)
    graph.replay()
    torch.cuda.synchronize()
    assert set(out.cpu().unique().tolist()) == {0, 1}
