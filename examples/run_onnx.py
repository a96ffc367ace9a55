"""Play Gymnasium with an agent that `dreamfleet export --onnx` has written, without torch.

pip install onnxruntime gymnasium
python examples/run_onnx.py agent.onnx CartPole-v1 SEED
"""

import json
import sys

import gymnasium
import numpy as np
import onnxruntime

path, env_id, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
agent = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
about = json.loads(agent.get_modelmeta().custom_metadata_map["description.json"])
((key, column),) = about["obs"].items()
env, rng = gymnasium.make(env_id), np.random.default_rng(seed)
draw = {"uniform": rng.random, "normal": rng.standard_normal}
state = {name: np.zeros(shape, np.float32) for name, shape in about["state"].items()}
seen, taken, rewards, over = env.reset(seed=seed)[0], [], 0.0, False
while not over:
    feeds = {"is_first": np.array([not taken]), **state}
    feeds[f"obs.{key}"] = np.asarray(seen, column["dtype"]).reshape(1, *column["shape"])
    for i, noise in enumerate(about["noise"]):
        feeds[f"noise.{i}"] = draw[noise["kind"]](noise["shape"], np.float32)
    action, *after = agent.run(["action.action", *(f"next.{name}" for name in state)], feeds)
    state = dict(zip(state, after, strict=True))
    taken.append(action[0].tolist())
    seen, reward, terminated, truncated, _ = env.step(action[0])
    rewards, over = rewards + float(reward), terminated or truncated
print(json.dumps({"return": rewards, "actions": taken}))
