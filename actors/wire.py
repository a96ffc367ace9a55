"""Messages between an actor and its environment processes: fixed layouts over a socket."""

from __future__ import annotations

import math
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
        self._columns = []
        self.size_bytes = 0
        for name, (dtype, shape) in order:
            kind, count = np.dtype(dtype), math.prod(shape)
            self._columns.append((name, kind, shape, count, self.size_bytes))
            self.size_bytes += kind.itemsize * count

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Return the values as one message."""
        parts = []
        for name, kind, _, count, _ in self._columns:
            part = np.asarray(values[name], kind)
            assert part.size == count, (name, part.shape)
            parts.append(part.tobytes())
        return b"".join(parts)

    def views(self, message: bytes | bytearray | memoryview) -> dict[str, NDArray[Any]]:
        """Return the columns of a message, sharing its memory."""
        return {
            name: np.frombuffer(message, kind, count, offset).reshape(shape)
            for name, kind, shape, count, offset in self._columns
        }


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
    """Framed messages over one stream socket. Use each end from one thread."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._buffer = bytearray(_HEADER.size)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def send(self, kind: int, payload: bytes = b"", timeout_s: float | None = None) -> None:
        """Send one message.

        Raises:
            ChannelClosed: the other side has gone.
            TimeoutError: it has not taken the message in time.
        """
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed from error

    def receive(
        self, timeout_s: float | None = None, whole_s: float | None = None
    ) -> tuple[int, bytearray] | None:
        """Return the next message, or None if none has begun within `timeout_s`.

        Args:
            timeout_s: for the first byte; None waits for ever.
            whole_s: for the rest of a message that has begun.

        Raises:
            ChannelClosed: the other side has gone.
            TimeoutError: a message has begun and is not completed in time.
        """
        try:
            self._socket.settimeout(timeout_s)
            first = self._socket.recv_into(self._buffer)
        except (TimeoutError, BlockingIOError):
            return None
        except ConnectionResetError as error:
            raise ChannelClosed from error
        if first == 0:
            raise ChannelClosed
        deadline = None if whole_s is None else time.monotonic() + whole_s
        self._fill(memoryview(self._buffer)[first:], deadline)
        kind, size = _HEADER.unpack(self._buffer)
        if size > _MOST_BYTES:
            raise ChannelClosed
        payload = bytearray(size)
        self._fill(memoryview(payload), deadline)
        return kind, payload

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _fill(self, view: memoryview, deadline: float | None) -> None:
        while view:
            left = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
            self._socket.settimeout(left)
            try:
                count = self._socket.recv_into(view)
            except ConnectionResetError as error:
                raise ChannelClosed from error
            if count == 0:
                raise ChannelClosed
            view = view[count:]
