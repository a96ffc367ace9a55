"""Hostile inputs for the chunk decoder: structured, seeded, and as many as wanted."""

from __future__ import annotations

import re
import resource
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zstandard

from replay_service import Chunk, ChunkError, EpisodeSummary, decode_chunk, encode_chunk
from replay_service.chunk import MAX_STREAM_CHARS, _checksum, max_blob_bytes
from tests.replay_service.records import SCHEMA, chunk, renamed

MAX_STEPS = 64
INPUTS_PER_MEASUREMENT = 500
MOST_BYTES = 4 * max_blob_bytes(SCHEMA, MAX_STEPS) + 2**20
"""What decoding one input may allocate: the input, its columns, and an interpreter's change."""
MOST_SECONDS = 1.0
"""Processor time that decoding one input may take; a valid chunk takes a tenth of a millisecond."""

MARKERS = (
    *(b"\xc1", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"),
    *(b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x05", b"\xc4\x00", b"\xcb\x7f\xf8"),
    *(b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\x91" * 40, b"\x81" * 40, b"\xa0"),
)
BOMBS = (
    zlib.compress(bytes(2**24), 9),
    zstandard.ZstdCompressor(level=3).compress(bytes(2**24)),
    zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**24)),
)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    *(-(2**63), -1, 0, 1, 2, 8, 64, 65, 2**31, 2**32, 2**53, 2**53 + 1, 2**63, 2**64 - 1),
    *(True, False, None, 1.5, float("nan"), float("inf"), -float("inf"), 1e308),
    *("", "a", "x" * MAX_STREAM_CHARS, "x" * (MAX_STREAM_CHARS + 1), "\0", "ä" * 99, "zlib", "raw"),
    *(b"", b"12345678", bytes(4096), {}, {"v": 1}, [], [0], [0, 0], [-1, 2**53], [0, 0, 0]),
    *([[1.0, 1, 0]] * 65, [[1.0, 1, 0]] * 66, [[1.0, 1, 3]], [["a"]], _nested(60)),
)


@dataclass
class Outcome:
    """What became of the inputs."""

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_bytes: int = 0


class Attacker:
    """Makes hostile inputs out of valid chunks; equal seeds make equal inputs."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        ends = (EpisodeSummary(1.5, 7, "terminated"), EpisodeSummary(-2.0, 0, "abandoned"))
        made = [renamed(chunk(slot, 2, steps), episodes=ends) for slot, steps in ((0, 1), (1, 8))]
        made.append(chunk(2, 1, MAX_STEPS))
        self._blobs = [encode_chunk(m, SCHEMA, c) for m in made for c in ("raw", "zlib", "zstd")]
        self._kinds: dict[str, Callable[[], bytes]] = {
            "flip": self._flip,
            "cut": self._cut,
            "insert": self._insert,
            "overwrite": self._overwrite,
            "splice": self._splice,
            "noise": self._noise,
            "field": self._field,
            "keys": self._keys,
            "column": self._column,
        }
        self.kinds = tuple(self._kinds)

    def next(self) -> tuple[str, bytes]:
        """Return the next input and the way in which it is hostile."""
        kind = self.kinds[self._below(len(self.kinds))]
        return kind, self._kinds[kind]()

    def _below(self, bound: int) -> int:
        return int(self._random.integers(max(bound, 1)))

    def _pick(self, values: Any) -> Any:
        return values[self._below(len(values))]

    def _junk(self, most: int) -> bytes:
        return self._pick(MARKERS) if self._below(2) else self._random.bytes(1 + self._below(most))

    def _flip(self) -> bytes:
        blob = bytearray(self._pick(self._blobs))
        for _ in range(1 + self._below(4)):
            blob[self._below(len(blob))] ^= 1 << self._below(8)
        return bytes(blob)

    def _cut(self) -> bytes:
        blob = self._pick(self._blobs)
        at = self._below(len(blob))
        return blob[:at] + blob[at + 1 + self._below(64) :] if self._below(2) else blob[:at]

    def _insert(self) -> bytes:
        blob = self._pick(self._blobs)
        at = self._below(len(blob))
        return blob[:at] + self._junk(32) + blob[at:]

    def _overwrite(self) -> bytes:
        blob, junk = self._pick(self._blobs), self._junk(16)
        # Most of what matters stands at the beginning.
        at = self._below(200 if self._below(2) else len(blob))
        return blob[:at] + junk + blob[at + len(junk) :]

    def _splice(self) -> bytes:
        one, other = self._pick(self._blobs), self._pick(self._blobs)
        return one[: self._below(len(one))] + other[self._below(len(other)) :]

    def _noise(self) -> bytes:
        return b"".join(self._junk(24) for _ in range(self._below(6)))

    def _field(self) -> bytes:
        data = self._opened()
        data[self._pick(sorted(data.keys() - {"crc32"}))] = self._pick(VALUES)
        return self._mended(data)

    def _keys(self) -> bytes:
        data = self._opened()
        if self._below(2):
            del data[self._pick(sorted(data))]
        if self._below(2):
            key = self._pick(("extra", "V", "", 7, b"v", "x" * 900))
            data[key] = self._pick(VALUES)
        cols = data.get("cols")
        if isinstance(cols, dict) and self._below(2):
            cols[self._pick(("reward", "image", "extra", 3))] = self._pick(VALUES)
        return self._mended(data)

    def _column(self) -> bytes:
        data = self._opened()
        cols = data["cols"]
        name = self._pick(sorted(cols))
        value = bytearray(cols[name])
        way = self._below(5)
        if way == 0:
            cols[name] = self._pick(BOMBS)
        elif way == 1:
            cols[name] = self._random.bytes(self._below(2 * len(value) + 2))
        elif way == 2:
            data["codec"] = self._pick(("raw", "zlib", "zstd"))
        elif way == 3:
            cols[name] = bytes(value[: self._below(len(value))])
        else:
            for _ in range(1 + self._below(3)):
                value[self._below(len(value))] ^= 1 << self._below(8)
            cols[name] = bytes(value)
        return self._mended(data)

    def _opened(self) -> dict[Any, Any]:
        data: dict[Any, Any] = msgpack.unpackb(self._pick(self._blobs))
        return data

    def _mended(self, data: dict[Any, Any]) -> bytes:
        """Encode it with the right checksum where it can have one: the attacker knows how."""
        try:
            data["crc32"] = _checksum(data, data["cols"], SCHEMA)
        except (KeyError, TypeError, OverflowError):
            data.setdefault("crc32", 0)
        return bytes(msgpack.packb(data))


def fuzz(inputs: int, seed: int, *, measure_every: int = 1) -> Outcome:
    """Decode hostile inputs; each must be refused as a ChunkError or be a chunk of the schema.

    Args:
        inputs: how many.
        seed: of the attacker.
        measure_every: one in so many groups of 500 inputs has its allocations traced, which makes
            it several times slower; 0 for none.

    Raises:
        AssertionError: naming input and seed, for any other error, or too much memory or time.
    """
    attacker, outcome = Attacker(seed), Outcome()
    for start in range(0, inputs, INPUTS_PER_MEASUREMENT):
        group = [attacker.next() for _ in range(min(INPUTS_PER_MEASUREMENT, inputs - start))]
        traced = measure_every and start // INPUTS_PER_MEASUREMENT % measure_every == 0
        if traced:
            tracemalloc.start()
        for at, (kind, blob) in enumerate(group, start):
            begin = time.process_time()
            try:
                accepted = _decode(blob)
            except Exception as error:
                raise AssertionError(f"seed {seed} input {at} ({kind}): {error!r}") from error
            spent = time.process_time() - begin
            assert spent < MOST_SECONDS, f"seed {seed} input {at} ({kind}) took {spent:.1f} s"
            outcome.slowest_s = max(outcome.slowest_s, spent)
            (outcome.accepted if accepted else outcome.refused)[kind] += 1
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MOST_BYTES, f"seed {seed} inputs from {start}: {peak} bytes allocated"
            outcome.peak_bytes = max(outcome.peak_bytes, peak)
    return outcome


def fuzz_within(headroom_bytes: int, inputs: int, seed: int) -> None:
    """Decode hostile inputs in a process that gets no more memory, whoever asks for it.

    Changes this process for good; meant for one of its own.

    Args:
        headroom_bytes: address space that is left once everything is loaded and warm.
        inputs, seed: as for `fuzz`.

    Raises:
        AssertionError: as `fuzz`; or if the limit would not have been noticed.
    """
    fuzz(2 * INPUTS_PER_MEASUREMENT, seed + 1, measure_every=0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + headroom_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fuzz(inputs, seed, measure_every=0)
    for inflate in (zlib.decompress, zstandard.ZstdDecompressor().decompress):
        bomb = BOMBS[0] if inflate is zlib.decompress else BOMBS[1]
        try:
            inflate(bomb)
        except (MemoryError, zstandard.ZstdError):
            continue
        raise AssertionError(f"{inflate} got the memory for a bomb: the limit says nothing")


def _decode(blob: bytes) -> bool:
    try:
        got = decode_chunk(blob, SCHEMA, MAX_STEPS)
    except ChunkError as error:
        # Libraries in C report a failed allocation as if the data were wrong.
        assert not re.search("memory|alloc", str(error), re.IGNORECASE), error
        return False
    _require_chunk(got)
    return True


def _require_chunk(got: Chunk) -> None:
    assert 1 <= got.steps <= MAX_STEPS and got.columns.keys() == SCHEMA.by_name.keys()
    assert 0 < len(got.stream) <= MAX_STREAM_CHARS and got.incarnation >= 0 and got.seq >= 1
    assert got.first_step >= 0 and len(got.version_min) == len(got.version_max) == 2
    for column in SCHEMA.columns:
        values = got.columns[column.name]
        assert values.dtype == column.dtype and values.shape == (got.steps, *column.shape)
        assert values.dtype.kind != "f" or np.isfinite(values).all()
        assert column.dtype != "bool" or values.view(np.uint8).max() <= 1
