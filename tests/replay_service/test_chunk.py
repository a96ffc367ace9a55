from __future__ import annotations

import tracemalloc
import zlib
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from replay_service import Chunk, ChunkError, EpisodeSummary, decode_chunk, encode_chunk
from replay_service.chunk import max_blob_bytes
from tests.replay_service.records import SCHEMA, chunk, columns, renamed

CODECS = ("auto", "zstd", "zlib", "raw")
EPISODES = (EpisodeSummary(1.5, 7, "terminated"), EpisodeSummary(-2.0, 0, "abandoned"))


def assert_same(got: Chunk, want: Chunk) -> None:
    for name, value in want.columns.items():
        assert got.columns[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got.columns[name], value)
    fields = (
        "stream",
        "incarnation",
        "seq",
        "first_step",
        "version_min",
        "version_max",
        "episodes",
    )
    for field in fields:
        assert getattr(got, field) == getattr(want, field), field


def tampered(**changes: Any) -> bytes:
    """Encode a chunk whose header was changed by somebody who also mended the checksum."""
    data = msgpack.unpackb(encode_chunk(chunk(0, 1), SCHEMA, "raw"))
    cols = changes.pop("cols", {})
    data.update(changes)
    data["cols"] = {**data["cols"], **cols} if isinstance(cols, dict) else cols
    keys = (
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
        "eps",
    )
    if isinstance(data["cols"], dict) and "crc32" not in changes:
        crc = zlib.crc32(msgpack.packb([data[key] for key in keys]))
        for column in SCHEMA.columns:
            value = data["cols"].get(column.name, b"")
            crc = zlib.crc32(value, crc) if isinstance(value, bytes) else crc
        data["crc32"] = crc
    return msgpack.packb(data)


@given(
    steps=st.integers(1, 40),
    slot=st.integers(0, 3),
    codec=st.sampled_from(CODECS),
    version=st.tuples(st.integers(-1, 9), st.integers(0, 2**40)),
)
@settings(max_examples=40, deadline=None)
def test_chunk_survives_the_wire(
    steps: int, slot: int, codec: Any, version: tuple[int, int]
) -> None:
    made = Chunk("käse/0", 3, 5, 99, columns(slot, 7, steps), version, version, EPISODES)
    assert_same(decode_chunk(encode_chunk(made, SCHEMA, codec), SCHEMA, steps), made)


def test_noise_is_sent_raw_and_regular_data_compressed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 2, 2, 3), np.uint8)
    plain = chunk(0, 1, 900)
    noisy = renamed(plain, columns={**plain.columns, "image": noise})
    codec = {
        name: msgpack.unpackb(encode_chunk(made, SCHEMA))["codec"]
        for name, made in (("plain", plain), ("noisy", noisy))
    }
    assert codec == {"plain": "zstd", "noisy": "raw"}


def test_encoding_refuses_columns_that_are_not_the_schemas() -> None:
    made = chunk(0, 1)
    without = {k: v for k, v in made.columns.items() if k != "reward"}
    with pytest.raises(ChunkError, match="columns are"):
        encode_chunk(renamed(made, columns=without), SCHEMA)
    wrong = {**made.columns, "reward": made.columns["reward"].astype(np.float64)}
    with pytest.raises(ChunkError, match=r"reward: float32\[\] got float64\[8\]"):
        encode_chunk(renamed(made, columns=wrong), SCHEMA)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"v": 2}, "wire version 2"),
        ({"v": True}, "wire version"),
        ({"schema": b"12345678"}, "schema"),
        ({"sid": ""}, "stream name"),
        ({"sid": "x" * 201}, "stream name"),
        ({"sid": 7}, "stream name"),
        ({"inc": -1}, "inc is -1"),
        ({"seq": 0}, "seq is 0"),
        ({"seq": True}, "seq is"),
        ({"t0": 2**60}, "t0 is"),
        ({"n": 0}, "n is 0"),
        ({"n": 9}, "expected an integer in"),
        ({"n": 65}, "n is 65"),
        ({"wmin": [0]}, "wmin is"),
        ({"wmax": [0, "a"]}, "wmax is"),
        ({"codec": "pickle"}, "codec"),
        ({"raw_len": 2**31}, "raw_len is"),
        ({"eps": [[1.0, 1, 0]] * 10}, "episodes are"),
        ({"eps": [[float("nan"), 1, 0]]}, "return is"),
        ({"eps": [[1, 1, 0]]}, "return is"),
        ({"eps": [[1.0, -1, 0]]}, "episode length"),
        ({"eps": [[1.0, 1, 3]]}, "episode end"),
        ({"eps": [7]}, "an episode is"),
        ({"crc32": 1}, "checksum differs"),
        ({"crc32": "x"}, "crc32 is"),
        ({"cols": 5}, "columns are"),
        ({"cols": {"reward": 5}}, "every column must be bytes"),
        ({"cols": {"reward": b"1234"}}, "'reward' has 4 bytes, expected 32"),
        ({"cols": {"reward": np.full(8, np.nan, "f4").tobytes()}}, "not finite"),
        ({"cols": {"deter": np.full(32, np.inf, "f2").tobytes()}}, "not finite"),
        ({"cols": {"is_last": b"\x02" * 8}}, "neither 0 nor 1"),
        ({"codec": "zlib"}, "not zlib data"),
        ({"codec": "zstd"}, "zstd"),
    ],
)
def test_tampered_chunk_is_refused_with_the_reason(changes: dict[str, Any], want: str) -> None:
    with pytest.raises(ChunkError, match=want):
        decode_chunk(tampered(**changes), SCHEMA, 64)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc1",
        b"\x80",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({"v": 1}),
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        msgpack.packb({"v": msgpack.ExtType(5, b"x")}),
        b"\xd6\xff" + b"\x00" * 4,
    ],
)
def test_bytes_that_are_no_chunk_are_refused(blob: bytes) -> None:
    with pytest.raises(ChunkError):
        decode_chunk(blob, SCHEMA, 64)


def test_oversized_blob_is_refused_before_it_is_read() -> None:
    with pytest.raises(ChunkError, match="exceed"):
        decode_chunk(b"\x00" * (max_blob_bytes(SCHEMA, 8) + 1), SCHEMA, 8)


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_decompression_bomb_allocates_no_more_than_the_column(codec: str) -> None:
    huge = 64 * 2**20
    if codec == "zlib":
        bomb = zlib.compress(bytes(huge), 9)
    else:
        bomb = zstandard.ZstdCompressor(level=19).compress(bytes(huge))
    made = chunk(0, 1, 1024)
    names = {name: b"" for name in made.columns}
    blob = tampered(codec=codec, cols={**names, "image": bomb})
    tracemalloc.start()
    with pytest.raises(ChunkError):
        decode_chunk(blob, SCHEMA, 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20, peak


def test_zstd_frame_without_a_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    made = chunk(0, 1)
    blobs = {k: compressor.compress(v.tobytes()) for k, v in made.columns.items()}
    with pytest.raises(ChunkError, match="another size"):
        decode_chunk(tampered(codec="zstd", cols=blobs), SCHEMA, 64)


@given(data=st.data(), codec=st.sampled_from(("zstd", "zlib", "raw")))
@settings(max_examples=400, deadline=None)
def test_damaged_chunk_is_refused_or_unchanged(data: st.DataObject, codec: Any) -> None:
    made = chunk(1, 2)
    blob = bytearray(encode_chunk(made, SCHEMA, codec))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1))
        kind = data.draw(st.sampled_from(("flip", "cut", "insert")))
        if kind == "flip":
            blob[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del blob[at : at + data.draw(st.integers(1, 20))]
        else:
            blob[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not blob:
            break
    try:
        got = decode_chunk(bytes(blob), SCHEMA, 64)
    except ChunkError:
        return
    assert_same(got, made)


@given(blob=st.binary(max_size=300))
@settings(max_examples=400, deadline=None)
def test_random_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(ChunkError):
        decode_chunk(blob, SCHEMA, 64)
