"""Messages between an actor and its environment processes: fixed layouts over a socket."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamer.spaces import ActionSpace, ObsSpace, record_column

HELLO, RESET, STEP, TRANSITION, FAILURE, PICTURE, CLOSE = range(7)
_HEADER = struct.Struct("<BI")
_FIRST_BYTES = 2**16
_MOST_BYTES = 2**28


class ChannelClosed(Exception):
    """The other side has gone."""


class Layout:
    """Where each column of a fixed set lies in a message.

    Args:
        columns: {name: (dtype, shape)}.
    """

    def __init__(self, columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        # Large items first, so that each one is aligned.
        order = sorted(columns.items(), key=lambda item: -np.dtype(item[1][0]).itemsize)
        self._form = np.dtype([(name, dtype, shape) for name, (dtype, shape) in order])
        self._draft = np.zeros((), self._form)
        self._names = self._form.names or ()

    @property
    def size_bytes(self) -> int:
        """Bytes of one message."""
        return self._form.itemsize

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Return the values as one message."""
        for name in self._names:
            self._draft[name] = values[name]
        return self._draft.tobytes()

    def views(self, message: bytes | bytearray) -> dict[str, NDArray[Any]]:
        """Return the columns of a message, sharing its memory."""
        row = np.frombuffer(message, self._form, 1)
        return {name: row[name][0] for name in self._names}


def transition_layout(obs_space: ObsSpace) -> Layout:
    """Return the layout of what an environment answers."""
    columns = {f"obs.{key}": record_column(spec) for key, spec in obs_space.items()}
    columns["reward"] = ("float32", ())
    columns["seconds"] = ("float32", ())
    columns["terminated"] = columns["truncated"] = ("bool", ())
    return Layout(columns)


def action_layout(action_space: ActionSpace) -> Layout:
    """Return the layout of an action."""
    return Layout({key: record_column(spec) for key, spec in action_space.items()})


class Channel:
    """Framed messages over one stream socket, one under way at a time. For one thread."""

    def __init__(self, end: socket.socket) -> None:
        # Timeouts in the kernel cost one call instead of the three that Python's own take.
        end.setblocking(True)
        self._socket = end
        self._buffer = bytearray(_FIRST_BYTES)
        self._limits: dict[int, float | None] = {}

    def send(self, kind: int, payload: bytes = b"", timeout_s: float | None = None) -> None:
        """Send one message.

        Raises:
            ChannelClosed: the other side has gone.
            TimeoutError: it has not taken the message in time.
        """
        self._limit(socket.SO_SNDTIMEO, timeout_s)
        try:
            self._socket.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed from error
        except BlockingIOError as error:
            raise TimeoutError("the other side takes nothing") from error

    def receive(
        self, timeout_s: float | None = None, whole_s: float | None = None
    ) -> tuple[int, bytes] | None:
        """Return the next message, or None if none has begun within `timeout_s`.

        Args:
            timeout_s: for the first byte; 0 looks without waiting, None waits for ever.
            whole_s: for the rest of a message that has begun.

        Raises:
            ChannelClosed: the other side has gone.
            TimeoutError: a message has begun and is not completed in time.
        """
        at_once = timeout_s == 0
        if not at_once:
            self._limit(socket.SO_RCVTIMEO, timeout_s)
        try:
            count = self._read(memoryview(self._buffer), socket.MSG_DONTWAIT if at_once else 0)
        except BlockingIOError:
            return None
        deadline = None if whole_s is None else time.monotonic() + whole_s
        count = self._fill(count, _HEADER.size, deadline)
        kind, size = _HEADER.unpack_from(self._buffer)
        if size > _MOST_BYTES:
            raise ChannelClosed(f"a message of {size} bytes was announced")
        whole = _HEADER.size + size
        if whole > len(self._buffer):
            self._buffer += bytes(whole - len(self._buffer))
        self._fill(count, whole, deadline)
        return kind, bytes(memoryview(self._buffer)[_HEADER.size : whole])

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _fill(self, count: int, wanted: int, deadline: float | None) -> int:
        """Read until the buffer holds `wanted` bytes of the message; return how many it holds."""
        while count < wanted:
            left = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
            self._limit(socket.SO_RCVTIMEO, left)
            try:
                count += self._read(memoryview(self._buffer)[count:])
            except BlockingIOError as error:
                raise TimeoutError("a message was not completed") from error
        return count

    def _read(self, view: memoryview, flags: int = 0) -> int:
        try:
            count = self._socket.recv_into(view, 0, flags)
        except ConnectionResetError as error:
            raise ChannelClosed from error
        if count == 0:
            raise ChannelClosed
        return count

    def _limit(self, option: int, timeout_s: float | None) -> None:
        if self._limits.get(option) != timeout_s:
            seconds = 0.0 if timeout_s is None else max(timeout_s, 1e-6)
            value = struct.pack("ll", int(seconds), round(seconds % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)
            self._limits[option] = timeout_s
