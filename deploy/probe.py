"""Look at an environment once, in a process of its own: it may hang, crash, or take the GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.envs import EnvConfig
from deploy.config import ConfigError
from dreamer.spaces import (
    ActionSpace,
    ObsSpace,
    check_observation_names,
    space_from_dict,
    space_to_dict,
)

TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class EnvFacts:
    """What a run must know about its environment before it starts."""

    obs_space: ObsSpace
    """Observations."""
    action_space: ActionSpace
    """Actions."""
    action_repeat: int
    """Environment frames per decision."""


def probe(env: str, config: EnvConfig, timeout_s: float = TIMEOUT_S) -> EnvFacts:
    """Make the environment, ask for its spaces, and close it again.

    Blocks until the process that does so has ended.

    Raises:
        ConfigError: it cannot be made, hangs or crashes, or has spaces that are not supported.
    """
    with tempfile.TemporaryDirectory(prefix="dreamfleet-") as folder:
        answer = Path(folder) / "answer.json"
        job = json.dumps({"env": env, "config": asdict(config), "answer": str(answer)})
        try:
            done = subprocess.run(
                [sys.executable, "-m", "deploy.probe", job],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"environment {env} did not start within {timeout_s:.0f} s; try it with "
                f"`dreamfleet check-env --env {env}`"
            ) from error
        if not answer.exists():
            raise ConfigError(f"environment {env} {_last_words(done)}")
        facts = json.loads(answer.read_text())
    if "error" in facts:
        raise ConfigError(facts["error"])
    return _facts(env, facts)


def _facts(env: str, facts: dict[str, Any]) -> EnvFacts:
    obs_space = space_from_dict(facts["obs"])
    check_observation_names(obs_space)
    return EnvFacts(
        obs_space=obs_space,
        action_space=space_from_dict(facts["action"]),
        action_repeat=int(facts["action_repeat"]),
    )


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        how = f"was ended by {signal.Signals(-done.returncode).name} while starting"
    else:
        how = f"ended its process while starting (exit code {done.returncode})"
    words = done.stderr.strip().splitlines()
    return f"{how}: {words[-1]}" if words else how


def main() -> None:
    """Answer one probe: make the environment and write what it is to the file that was named."""
    job = json.loads(sys.argv[1])
    try:
        from actors.envs import make_env

        env = make_env(job["env"], EnvConfig(**job["config"]), 0)
        facts = {
            "obs": space_to_dict(env.obs_space),
            "action": space_to_dict(env.action_space),
            "action_repeat": env.action_repeat,
        }
        env.close()
    except Exception as error:
        # Whatever an environment raises is the user's to read, in one sentence.
        text = " ".join(str(error).split()) or type(error).__name__
        ours = isinstance(error, ValueError) and type(error) is not ValueError
        facts = {"error": text if ours else f"environment {job['env']}: {text}"}
    Path(job["answer"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
