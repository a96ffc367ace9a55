"""The unit of transport: consecutive records of one stream, and their wire format.

A chunk travels as one msgpack map of integers, strings and bytes. Decoding treats the bytes as
hostile: every size is compared with what the schema allows *before* anything of that size is
allocated, and whatever is wrong raises `ChunkError`. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import msgpack
import numpy as np

from replay_service.errors import ChunkError
from replay_service.schema import Column, Schema

WIRE_VERSION = 1
MAX_STREAM_CHARS = 200
MAX_CHUNK_STEPS = 1024
_HEADER_BYTES = 16_384
_PROBE_BYTES = 65_536
_WORTHWHILE = 0.9
_MAX_INT = 2**53
_SHOWN = 40

Codec = Literal["auto", "zstd", "zlib", "raw"]
EpisodeEnd = Literal["terminated", "truncated", "abandoned"]
_ENDS = get_args(EpisodeEnd)
_HEADER_KEYS = (
    "v",
    "schema",
    "sid",
    "inc",
    "seq",
    "t0",
    "n",
    "wmin",
    "wmax",
    "codec",
    "raw_len",
) + ("crc32", "eps")
_ALL_KEYS = frozenset(_HEADER_KEYS + ("cols",))


@dataclass(frozen=True)
class EpisodeSummary:
    """An episode that ended inside a chunk: its return, its transitions, and how it ended."""

    ret: float
    length: int
    end: EpisodeEnd


@dataclass(frozen=True)
class Chunk:
    """Up to T consecutive records of one stream, columnar.

    Attributes:
        stream: name of the environment slot.
        incarnation: which life of that slot; (stream, incarnation) names one gapless stream.
        seq: 1 for the first chunk of the stream, then consecutive.
        first_step: number of records that precede this chunk in the stream.
        columns: name → (n, *shape) array in the dtype of the schema.
        version_min, version_max: oldest and newest policy (fence, update) that acted in it.
        episodes: those that ended inside it, in order.
    """

    stream: str
    incarnation: int
    seq: int
    first_step: int
    columns: dict[str, np.ndarray]
    version_min: tuple[int, int] = (0, 0)
    version_max: tuple[int, int] = (0, 0)
    episodes: tuple[EpisodeSummary, ...] = ()

    @property
    def steps(self) -> int:
        """Number of records."""
        return len(next(iter(self.columns.values())))

    @property
    def sid(self) -> str:
        """Name of the stream including its incarnation, as the server keys it."""
        return stream_id(self.stream, self.incarnation)


def stream_id(stream: str, incarnation: int) -> str:
    """Return the name under which the server keeps one incarnation of a stream."""
    return f"{stream}@{incarnation}"


def max_blob_bytes(schema: Schema, max_steps: int) -> int:
    """Return the largest encoded size that a chunk of `max_steps` records may have."""
    raw = schema.step_bytes * max_steps
    return raw + raw // 64 + 64 * max_steps + _HEADER_BYTES


def encode_chunk(chunk: Chunk, schema: Schema, codec: Codec = "auto") -> bytes:
    """Encode a chunk for the wire.

    Args:
        chunk: its columns must match the schema exactly.
        schema: the columns of the replay.
        codec: `auto` takes zstd (zlib where zstandard is not installed), and raw bytes where a
            sample of the largest column does not compress by at least a tenth.

    Raises:
        ChunkError: if the columns are not those of the schema.
    """
    raw = _raw_columns(chunk, schema)
    name = _choose_codec(raw) if codec == "auto" else codec
    compress = _compressor(name)
    blobs = {key: compress(data) for key, data in raw.items()}
    header = {
        "v": WIRE_VERSION,
        "schema": schema.hash,
        "sid": chunk.stream,
        "inc": chunk.incarnation,
        "seq": chunk.seq,
        "t0": chunk.first_step,
        "n": chunk.steps,
        "wmin": list(chunk.version_min),
        "wmax": list(chunk.version_max),
        "codec": name,
        "raw_len": sum(len(data) for data in raw.values()),
        "eps": [[e.ret, e.length, _ENDS.index(e.end)] for e in chunk.episodes],
    }
    header["crc32"] = _checksum(header, blobs, schema)
    size = sum(len(blob) for blob in blobs.values()) + _HEADER_BYTES
    packer = msgpack.Packer(buf_size=size, use_single_float=False)
    return bytes(packer.pack({**header, "cols": blobs}))


def decode_chunk(blob: bytes, schema: Schema, max_steps: int = MAX_CHUNK_STEPS) -> Chunk:
    """Decode and verify a chunk; the bytes may come from anybody.

    Args:
        blob: the encoded chunk.
        schema: the columns that are expected.
        max_steps: longest chunk that is accepted.

    Returns:
        The chunk; its arrays are read-only views where the codec is raw.

    Raises:
        ChunkError: for anything that `encode_chunk` could not have produced for this schema.
    """
    data = _unpack(blob, schema, max_steps)
    steps = _check_header(data, schema, max_steps)
    cols = data["cols"]
    if type(cols) is not dict or cols.keys() != schema.by_name.keys():
        raise ChunkError(f"columns are {brief(cols)}, expected {sorted(schema.by_name)}")
    if any(type(value) is not bytes for value in cols.values()):
        raise ChunkError("every column must be bytes")
    if _checksum(data, cols, schema) != data["crc32"]:
        raise ChunkError("checksum differs: the chunk was damaged")
    decompress = _decompressor(data["codec"])
    columns = {c.name: _column(decompress, cols[c.name], c, steps) for c in schema.columns}
    return Chunk(
        stream=data["sid"],
        incarnation=data["inc"],
        seq=data["seq"],
        first_step=data["t0"],
        columns=columns,
        version_min=tuple(data["wmin"]),
        version_max=tuple(data["wmax"]),
        episodes=tuple(EpisodeSummary(float(r), n, _ENDS[end]) for r, n, end in data["eps"]),
    )


def _raw_columns(chunk: Chunk, schema: Schema) -> dict[str, memoryview]:
    if chunk.columns.keys() != schema.by_name.keys():
        raise ChunkError(f"columns are {sorted(chunk.columns)}, expected {sorted(schema.by_name)}")
    raw = {}
    for column in schema.columns:
        array = np.ascontiguousarray(chunk.columns[column.name])
        if array.dtype != column.dtype or array.shape != (chunk.steps, *column.shape):
            raise ChunkError(f"column {column} got {array.dtype}{list(array.shape)}")
        raw[column.name] = array.reshape(-1).view(np.uint8).data
    return raw


def _choose_codec(raw: dict[str, memoryview]) -> str:
    best = "zstd" if _zstandard() else "zlib"
    sample = max(raw.values(), key=len)[:_PROBE_BYTES]
    return best if len(_compressor(best)(sample)) < _WORTHWHILE * len(sample) else "raw"


def _zstandard() -> Any:
    """Return the optional module, or None where it is not installed."""
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard


def _compressor(name: str) -> Callable[[Any], Any]:
    if name == "raw":
        return lambda data: data
    if name == "zlib":
        return lambda data: zlib.compress(data, 1)
    zstandard = _zstandard()
    if name != "zstd" or zstandard is None:
        raise ChunkError(f"codec {name!r} is not available; install zstandard or use zlib or raw")
    return zstandard.ZstdCompressor(level=1).compress  # type: ignore[no-any-return]


def _decompressor(name: str) -> Callable[[bytes, int], bytes]:
    """Return a function (data, exact size) → bytes that never allocates more than that size."""
    if name == "raw":
        return lambda data, size: data
    if name == "zlib":
        return _inflate
    zstandard = _zstandard()
    if zstandard is None:
        raise ChunkError("the chunk is compressed with zstd: install the package zstandard")
    plain = zstandard.ZstdDecompressor(max_window_size=2**27)

    def decompress(data: bytes, size: int) -> bytes:
        # The library allocates what the frame claims, so the claim is checked first.
        try:
            if zstandard.frame_content_size(data) != size:
                raise ChunkError(f"a zstd frame claims another size than the expected {size} bytes")
            return bytes(plain.decompress(data, max_output_size=size, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise ChunkError(f"not a zstd frame: {error}") from error

    return decompress


def _inflate(data: bytes, size: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ChunkError(f"not zlib data: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise ChunkError(f"zlib data does not end after the expected {size} bytes")
    return out


@cache
def _crc32() -> Callable[..., int]:
    """Return CRC-32; with the optional isal it has vector instructions, ten times faster."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        from zlib import crc32
    return crc32


def _checksum(header: dict[str, Any], blobs: dict[str, Any], schema: Schema) -> int:
    """CRC-32 of the header without its checksum, then of each column in the schema's order."""
    keys = [key for key in _HEADER_KEYS if key != "crc32"]
    crc32 = _crc32()
    crc = crc32(msgpack.packb([header[key] for key in keys]))
    for column in schema.columns:
        crc = crc32(blobs[column.name], crc)
    return crc


def _unpack(blob: bytes, schema: Schema, max_steps: int) -> dict[str, Any]:
    limit = max_blob_bytes(schema, max_steps)
    if len(blob) > limit:
        raise ChunkError(f"{len(blob)} bytes exceed the {limit} that {max_steps} steps may take")
    try:
        data = msgpack.unpackb(
            blob,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=MAX_STREAM_CHARS * 4,
            max_bin_len=len(blob),
            max_array_len=max(max_steps + 1, 4),
            max_map_len=max(len(schema.columns), len(_ALL_KEYS)),
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ChunkError(f"not a msgpack map: {type(error).__name__}: {error!s:.100}") from error
    if type(data) is not dict or data.keys() != _ALL_KEYS:
        raise ChunkError(f"the header is {brief(data)}, expected the keys {sorted(_ALL_KEYS)}")
    return data


def _check_header(data: dict[str, Any], schema: Schema, max_steps: int) -> int:
    if data["v"] != WIRE_VERSION or type(data["v"]) is not int:
        raise ChunkError(f"wire version {brief(data['v'])}, this program reads {WIRE_VERSION}")
    if data["schema"] != schema.hash:
        raise ChunkError(f"schema {brief(data['schema'])}, expected {schema.hash.hex()}")
    if type(data["sid"]) is not str or not 0 < len(data["sid"]) <= MAX_STREAM_CHARS:
        raise ChunkError(f"stream name {brief(data['sid'])}")
    for key, low, high in (
        ("inc", 0, _MAX_INT),
        ("seq", 1, _MAX_INT),
        ("t0", 0, _MAX_INT),
        ("n", 1, max_steps),
        ("crc32", 0, 2**32 - 1),
    ):
        _check_int(key, data[key], low, high)
    for key in ("wmin", "wmax"):
        if type(data[key]) is not list or len(data[key]) != 2:
            raise ChunkError(f"{key} is {brief(data[key])}, expected [fence, update]")
        for number in data[key]:
            _check_int(key, number, -1, _MAX_INT)
    if data["codec"] not in ("raw", "zlib", "zstd"):
        raise ChunkError(f"codec {brief(data['codec'])}")
    steps: int = data["n"]
    _check_int("raw_len", data["raw_len"], steps * schema.step_bytes, steps * schema.step_bytes)
    _check_episodes(data["eps"], steps)
    return steps


def _check_episodes(episodes: Any, steps: int) -> None:
    if type(episodes) is not list or len(episodes) > steps + 1:
        raise ChunkError(f"episodes are {brief(episodes)}")
    for episode in episodes:
        if type(episode) is not list or len(episode) != 3:
            raise ChunkError(f"an episode is {brief(episode)}, expected [return, length, end]")
        ret, length, end = episode
        if type(ret) is not float or not math.isfinite(ret):
            raise ChunkError(f"an episode's return is {brief(ret)}")
        _check_int("episode length", length, 0, _MAX_INT)
        _check_int("episode end", end, 0, len(_ENDS) - 1)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ChunkError(f"{name} is {brief(value)}, expected an integer in [{low}, {high}]")


def _column(
    decompress: Callable[[bytes, int], bytes], blob: bytes, column: Column, steps: int
) -> np.ndarray:
    size = steps * column.step_bytes
    data = decompress(blob, size)
    if len(data) != size:
        raise ChunkError(f"column {column.name!r} has {len(data)} bytes, expected {size}")
    if column.dtype == "bool" and np.frombuffer(data, np.uint8).max() > 1:
        raise ChunkError(f"column {column.name!r} holds bytes that are neither 0 nor 1")
    array = np.frombuffer(data, column.dtype).reshape((steps, *column.shape))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ChunkError(f"column {column.name!r} holds values that are not finite")
    return array


def brief(value: Any) -> str:
    """Shorten a hostile value for a message."""
    if isinstance(value, dict):
        return f"a map with keys {sorted(map(str, value))!r:.200}"
    if isinstance(value, (str, bytes)):
        return repr(value[:_SHOWN])
    return f"{value!r:.80}" if isinstance(value, int) else f"a {type(value).__name__}"
