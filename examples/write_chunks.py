"""Write experience from a robot or a simulator that has neither torch nor ray.

pip install numpy msgpack redis; pip install --no-deps .
python examples/write_chunks.py redis://127.0.0.1:6379 1000
"""

import sys

import numpy as np

import replay_service as replay
from replay_service.schema import REQUIRED

COLUMNS = (("position", "float32", (3,)), *REQUIRED, ("action", "float32", (1,)))
SCHEMA = replay.Schema(tuple(replay.Column(*column) for column in COLUMNS))
EPISODE = 200


def record(step: int) -> dict[str, np.ndarray | np.generic]:
    """Return what was observed at a step, and the action chosen after seeing it."""
    return {
        "position": np.full(3, step % EPISODE, np.float32),
        "reward": np.float32(0),
        "is_first": np.bool_(step % EPISODE == 0),
        "is_last": np.bool_(step % EPISODE == EPISODE - 1),
        "is_terminal": np.bool_(False),
        "action": np.zeros(1, np.float32),
    }


def main(url: str, steps: int) -> None:
    """Write the steps as one stream, creating the replay if no learner has done so."""
    client = replay.ReplayClient(url)
    try:
        client.schema()
    except replay.ReplayUnavailable:
        client.create(SCHEMA, replay.Limits(capacity_steps=10**6, capacity_bytes=2**30))
    with replay.Uploader(client, SCHEMA, replay.ReplayConfig(chunk_steps=64)) as uploader:
        writer = uploader.open_stream("robot-7")
        for step in range(steps):
            writer.append(record(step))  # waits while the train ratio admits no more
        writer.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
