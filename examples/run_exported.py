"""Play Gymnasium with an agent that `dreamfleet export` has written, without dreamfleet.

pip install torch gymnasium
python examples/run_exported.py agent.pt2 CartPole-v1 SEED
"""

import json
import sys

import gymnasium
import numpy as np
import torch

path, env_id, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = {"description.json": ""}
act = torch.export.load(path, extra_files=files).module()
about = json.loads(files["description.json"])
((key, column),) = about["obs"].items()
env, state = gymnasium.make(env_id), [torch.zeros(shape) for shape in about["state"].values()]
torch.manual_seed(seed)
seen, taken, rewards, over = env.reset(seed=seed)[0], [], 0.0, False
while not over:
    obs = torch.from_numpy(np.asarray(seen, column["dtype"]).reshape(1, *column["shape"]))
    actions, *state = act({key: obs}, torch.tensor([not taken]), *state)
    taken.append(actions["action"][0].tolist())
    seen, reward, terminated, truncated, _ = env.step(actions["action"][0].numpy())
    rewards, over = rewards + float(reward), terminated or truncated
print(json.dumps({"return": rewards, "actions": taken}))
