"""Device memory of the mirror, and the operations on it that run inside an update.

The functions have static shapes and never wait for the device, so they can be part of a captured
graph: `window_rows` turns random numbers into row numbers, `gather` reads rows, `write_back`
replaces them.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from replay_service.errors import ReplayConfigError
from replay_service.memory import available_ram_bytes
from replay_service.schema import Column, Schema

log = logging.getLogger(__name__)

Placement = Literal["auto", "cuda", "ram", "disk"]

_AUTO_SHARE = 0.6
_MIB = 1024**2
_DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
}


def window_rows(
    uniforms: Tensor,
    explicit: Tensor,
    valid_cumsum: Tensor,
    next_page: Tensor,
    page_steps: int,
    length: int,
) -> Tensor:
    """Choose windows and return the rows of their records.

    Every valid start is equally likely: ``pos = ⌊u·total⌋``, its page is the first whose
    cumulative count exceeds ``pos``, and its rows follow the page links.

    Args:
        uniforms: (B,) float64 in [0, 1).
        explicit: (B,) int64 rows at which a window starts, or -1 to draw one uniformly.
        valid_cumsum: (pages,) int64 cumulative counts of valid starts; the last must be above 0.
        next_page: (pages,) int64 successor of each page within its stream, or -1.
        page_steps: rows per page.
        length: records per window, at most the window length of the index.

    Returns:
        (B, length) int64 row numbers.
    """
    total = valid_cumsum[-1]
    # The clamps keep rows in range where there is no window; with windows they change nothing.
    position = torch.minimum((uniforms * total).long(), total - 1).clamp(min=0)
    page = torch.searchsorted(valid_cumsum, position, right=True).clamp(max=len(valid_cumsum) - 1)
    before = torch.where(page > 0, valid_cumsum[(page - 1).clamp(min=0)], 0)
    start = torch.where(explicit >= 0, explicit, page * page_steps + position - before)
    page, offset = start // page_steps, start % page_steps
    chain = [page]
    for _ in range((page_steps + length - 2) // page_steps):
        chain.append(next_page[chain[-1]].clamp(min=0))
    steps = offset[:, None] + torch.arange(length, device=start.device)
    pages = torch.stack(chain, dim=1).gather(1, steps // page_steps)
    return pages * page_steps + steps % page_steps


def gather(
    columns: Mapping[str, Tensor], rows: Tensor, out: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read rows of every column.

    Args:
        columns: name → (rows, *shape).
        rows: (B, L) int64, on the columns' device.
        out: name → (B, L, *shape) contiguous, to write to instead of allocating.

    Returns:
        name → (B, L, *shape).
    """
    flat = rows.reshape(-1)
    result = {}
    for name, column in columns.items():
        shape = (*rows.shape, *column.shape[1:])
        if out is None:
            result[name] = column.index_select(0, flat).view(shape)
        else:
            target = out[name].view(len(flat), *column.shape[1:])
            torch.index_select(column, 0, flat, out=target)
            result[name] = out[name]
    return result


def write_back(columns: Mapping[str, Tensor], rows: Tensor, values: Mapping[str, Tensor]) -> None:
    """Replace rows of some columns in place; of a row that is there twice the last value stays.

    Args:
        columns: name → (rows, *shape).
        rows: (B, L) int64, on the columns' device.
        values: name → (B, L, *shape) in the columns' dtypes.
    """
    flat = rows.reshape(-1)
    # Windows overlap. A GPU writes all of them at once, so that a row would end as a mixture of
    # two windows, another one each time; a CPU writes one after the other.
    last = last_of_each(flat) if flat.is_cuda else None
    for name, value in values.items():
        column = columns[name]
        value = value.reshape(len(flat), *column.shape[1:]).to(column.device)
        column.index_copy_(0, flat, value if last is None else value[last])


def last_of_each(rows: Tensor) -> Tensor:
    """Return for every place in (N,) the last place that has the same number, (N,) int64."""
    places = torch.arange(len(rows), device=rows.device)
    return torch.where(rows[:, None] == rows, places, 0).amax(1)


class DeviceStorage:
    """The columns and the page arrays of a mirror, in GPU memory, RAM or a memory-mapped file.

    The tensors keep their storage for life; on the CPU the numpy arrays of the page index are
    views of them.

    Args:
        schema: one tensor per column.
        rows, pages: sizes.
        placement: where; `auto` takes the first of cuda, ram and disk that fits, and logs which.
        device: the learner's device, for example ``cpu`` or ``cuda:0``.
        directory: for the memory-mapped file; the system's temporary one if None.

    Raises:
        ReplayConfigError: if the chosen place is too small, with the arithmetic.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        rows: int,
        pages: int,
        placement: Placement,
        device: str,
        directory: Path | None,
    ) -> None:
        need = rows * schema.step_bytes
        directory = Path(directory or tempfile.gettempdir())
        self.placement = _choose(need, placement, torch.device(device), directory)
        self.device = torch.device(device if self.placement == "cuda" else "cpu")
        log.info("mirror_placed where=%s rows=%d mib=%d", self.placement, rows, need // _MIB)
        self._directory = directory
        self._pinned = self.placement == "ram" and torch.device(device).type == "cuda"
        self.columns = {column.name: self._allocate(column, rows) for column in schema.columns}
        self.valid_cumsum = torch.zeros(pages, dtype=torch.int64, device=self.device)
        self.next_page = torch.full((pages,), -1, dtype=torch.int64, device=self.device)
        self._on_host = self.device.type == "cpu"
        self._views = (
            {name: tensor.numpy() for name, tensor in self.columns.items()} if self._on_host else {}
        )
        self.host_cumsum = self._host_array(self.valid_cumsum)
        self.host_next_page = self._host_array(self.next_page)

    def write(self, row: int, values: Mapping[str, np.ndarray]) -> None:
        """Copy consecutive records to the rows from `row` on."""
        for name, value in values.items():
            if self._on_host:
                np.copyto(self._views[name][row : row + len(value)], value)
            else:
                # A view of read-only bytes cannot be wrapped, and a pageable copy is synchronous,
                # so the source may be freed right after.
                source = torch.from_numpy(value if value.flags.writeable else value.copy())
                self.columns[name][row : row + len(value)].copy_(source)

    def memory(self, touched_rows: int) -> tuple[int, int]:
        """Return the bytes that all rows take, and how many there would be room for.

        Args:
            touched_rows: that were ever written: RAM and disk are only taken then.
        """
        row_bytes = sum(c.element_size() * c[:1].numel() for c in self.columns.values())
        whole = row_bytes * len(next(iter(self.columns.values())))
        lazy = self.placement == "disk" or (self.placement == "ram" and not self._pinned)
        taken = row_bytes * touched_rows if lazy else whole
        return whole, taken + _free_bytes(self.device, self._directory)[self.placement]

    def publish_index(self) -> None:
        """Make the host's page arrays visible on the device, in place."""
        if not self._on_host:
            self.valid_cumsum.copy_(torch.from_numpy(self.host_cumsum))
            self.next_page.copy_(torch.from_numpy(self.host_next_page))

    def _host_array(self, tensor: Tensor) -> np.ndarray:
        return tensor.numpy() if self._on_host else tensor.cpu().numpy()

    def _allocate(self, column: Column, rows: int) -> Tensor:
        shape, dtype = (rows, *column.shape), _DTYPES[column.dtype]
        if self.placement == "disk":
            return _mapped(shape, column.dtype, self._directory)
        return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self._pinned)


def _mapped(shape: tuple[int, ...], dtype: str, directory: Path) -> Tensor:
    directory.mkdir(parents=True, exist_ok=True)
    # The file has no name once it is mapped, so that nothing stays behind, whatever ends us.
    with tempfile.TemporaryFile(dir=directory, prefix="mirror-") as file:
        file.truncate(math.prod(shape) * np.dtype(dtype).itemsize)
        array: np.memmap = np.memmap(file, dtype, "r+", shape=shape)
    return torch.from_numpy(array)


def _choose(
    need: int, placement: Placement, device: torch.device, directory: Path
) -> Literal["cuda", "ram", "disk"]:
    if placement == "cuda" and device.type != "cuda":
        raise ReplayConfigError(
            f"placement is cuda but the learner's device is {device}; use auto, ram or disk"
        )
    free = _free_bytes(device, directory)
    if placement != "auto":
        _require(need, free[placement], placement)
        return placement
    for name in ("cuda", "ram"):
        if need <= free[name] * _AUTO_SHARE:
            return name
    _require(need, free["disk"], "disk")
    return "disk"


def _require(need: int, free: int, place: str) -> None:
    if need > free:
        raise ReplayConfigError(
            f"the mirror needs {need / _MIB:.0f} MiB, {place} has {free / _MIB:.0f} MiB free; "
            "lower capacity_steps or choose another placement"
        )


def _free_bytes(device: torch.device, directory: Path) -> dict[str, int]:
    vram = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "cuda": vram,
        "ram": available_ram_bytes(),
        "disk": shutil.disk_usage(directory).free,
    }
