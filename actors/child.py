"""The process that one environment lives in: `python -m actors.child <descriptor> <parent>`."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any

from actors.envs import EnvConfig, make_env
from actors.envs.base import Env
from actors.spaces import BadOutput
from actors.wire import (
    CLOSE,
    FAILURE,
    HELLO,
    PICTURE,
    RESET,
    STEP,
    TRANSITION,
    Channel,
    ChannelClosed,
    Layout,
    action_layout,
    transition_layout,
)
from dreamer.spaces import space_to_dict

_DEATH_SIGNAL_OPTION = 1


def main() -> None:
    """Make the environment that the first message names, then answer until told to close."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    faulthandler.enable()
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        env = _make(channel)
        if env is not None:
            _serve(channel, env)
    except ChannelClosed:
        return


def _die_with(parent: int) -> None:
    """Have the kernel end this process together with the thread that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL_OPTION, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _make(channel: Channel) -> Env | None:
    message = channel.receive()
    assert message is not None
    wanted = json.loads(message[1])
    try:
        env = make_env(wanted["env_id"], EnvConfig(**wanted["config"]))
    except Exception as error:
        # The other side decides: a wrong name is final, a crash may be worth another try.
        _fail(channel, "start", _text(error), fatal=isinstance(error, ValueError))
        return None
    hello = {
        "obs_space": space_to_dict(env.obs_space),
        "action_space": space_to_dict(env.action_space),
        "action_repeat": env.action_repeat,
    }
    channel.send(HELLO, json.dumps(hello).encode())
    return env


def _serve(channel: Channel, env: Env) -> None:
    answer, actions = transition_layout(env.obs_space), action_layout(env.action_space)
    while True:
        message = channel.receive()
        assert message is not None
        kind, payload = message
        if kind == CLOSE:
            env.close()
            return
        try:
            channel.send(*_respond(env, kind, payload, answer, actions))
        except BadOutput as error:
            _fail(channel, "rejected", str(error), label=error.reason)
        except ChannelClosed:
            raise
        except Exception:
            _fail(channel, "crash", traceback.format_exc())
            raise


def _respond(
    env: Env, kind: int, payload: bytes, answer: Layout, actions: Layout
) -> tuple[int, bytes]:
    begin = time.perf_counter()
    values: dict[str, Any] = {"reward": 0.0, "terminated": False, "truncated": False}
    if kind == RESET:
        (seed,) = struct.unpack("<q", payload)
        obs = env.reset(None if seed < 0 else seed)
    elif kind == STEP:
        obs, reward, terminated, truncated = env.step(actions.views(payload))
        values = {"reward": reward, "terminated": terminated, "truncated": truncated}
    else:
        picture = env.render()
        if picture is None:
            return PICTURE, b""
        return PICTURE, struct.pack("<II", *picture.shape[:2]) + picture.tobytes()
    values["seconds"] = time.perf_counter() - begin
    return TRANSITION, answer.pack(values | {f"obs.{key}": value for key, value in obs.items()})


def _fail(
    channel: Channel, reason: str, message: str, label: str = "", fatal: bool = False
) -> None:
    failure = {"reason": reason, "label": label or reason, "message": message, "fatal": fatal}
    channel.send(FAILURE, json.dumps(failure).encode())


def _text(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    return traceback.format_exc()


if __name__ == "__main__":
    main()
