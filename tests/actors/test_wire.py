import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from actors.wire import Channel, ChannelClosed, Layout, action_layout, transition_layout
from dreamer.spaces import BoxAction, DiscreteAction, DiscreteSpec, ImageSpec, VectorSpec


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a channel."""
    left, right = (Channel(end) for end in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_layout_gives_back_what_was_packed_with_aligned_columns() -> None:
    layout = Layout({"a": ("bool", ()), "b": ("float32", (3,)), "c": ("uint8", (2, 2, 1))})
    values = {
        "a": True,
        "b": np.arange(3, dtype=np.float32),
        "c": np.arange(4, dtype=np.uint8).reshape(2, 2, 1),
    }
    message = layout.pack(values)
    assert len(message) == layout.size_bytes == 1 + 12 + 4
    views = layout.views(message)
    assert bool(views["a"]) and views["a"].shape == ()
    for name in ("b", "c"):
        np.testing.assert_array_equal(views[name], values[name])
    assert views["b"].flags.aligned


def test_transition_and_action_have_the_columns_of_their_spaces() -> None:
    answer = transition_layout(
        {
            "image": ImageSpec(shape=(8, 8, 3)),
            "v": VectorSpec(shape=(2,)),
            "d": DiscreteSpec(classes=3),
        }
    )
    assert answer.size_bytes == 8 * 8 * 3 + 2 * 4 + 4 + 4 + 4 + 2
    actions = action_layout(
        {"action.a": DiscreteAction(classes=2), "action.b": BoxAction(low=(-1.0,), high=(1.0,))}
    )
    assert actions.size_bytes == 8


def test_message_larger_than_the_sockets_buffer_arrives_whole(
    ends: tuple[Channel, Channel],
) -> None:
    left, right = ends
    payload = np.random.default_rng(0).bytes(3_000_000)
    sender = threading.Thread(target=left.send, args=(3, payload))
    sender.start()
    assert right.receive(5.0, 5.0) == (3, bytearray(payload))
    sender.join()


def test_nothing_within_the_timeout_is_none_and_half_a_message_is_an_error(
    ends: tuple[Channel, Channel],
) -> None:
    left, right = ends
    begin = time.monotonic()
    assert right.receive(0.0) is None
    assert right.receive(0.01) is None
    assert time.monotonic() - begin < 1.0
    left._socket.sendall(b"\x01")
    with pytest.raises(TimeoutError):
        right.receive(1.0, whole_s=0.05)


def test_closed_other_side_is_noticed_when_reading_and_when_writing(
    ends: tuple[Channel, Channel],
) -> None:
    left, right = ends
    left.close()
    with pytest.raises(ChannelClosed):
        right.receive(1.0)
    with pytest.raises(ChannelClosed):
        right.send(1, b"x" * 100)
        right.send(1, b"x" * 100)


def test_message_of_an_absurd_size_is_not_read(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left._socket.sendall(b"\x01\xff\xff\xff\xff")
    with pytest.raises(ChannelClosed):
        right.receive(1.0, 1.0)
