"""Write experience from a robot or a simulator that has neither torch nor ray.

pip install numpy msgpack redis; pip install --no-deps .
python examples/write_chunks.py redis://127.0.0.1:6379 1000
"""

import sys

import numpy as np

import replay_service as replay

url, steps, episode = sys.argv[1], int(sys.argv[2]), 200
columns = [("position", "float32", (3,)), ("action", "float32", (1,)), ("reward", "float32")]
columns += [(flag, "bool") for flag in ("is_first", "is_last", "is_terminal")]
schema = replay.Schema(tuple(replay.Column(*column) for column in columns))
client = replay.ReplayClient(url)
try:
    client.schema()
except replay.ReplayMissing:  # no learner has created the replay yet
    client.create(schema, replay.Limits(capacity_steps=10**6, capacity_bytes=2**30))
with replay.Uploader(client, schema, replay.ReplayConfig()) as uploader:
    writer = uploader.open_stream("robot-7")
    for step in range(steps):
        observed = {
            "position": np.full(3, step % episode, np.float32),
            "reward": np.float32(0),  # for arriving here
            "is_first": np.bool_(step % episode == 0),
            "is_last": np.bool_(step % episode == episode - 1),
            "is_terminal": np.bool_(False),
        }
        action = np.zeros(1, np.float32)  # chosen after seeing it
        writer.append({**observed, "action": action})  # waits while the train ratio admits no more
    writer.close()
