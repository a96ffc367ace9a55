"""Environments by name, one file per suite. Suites are loaded when an environment asks for them."""

from actors.envs.config import EnvConfig
from actors.envs.registry import EnvError, env_spaces, make_env

__all__ = ["EnvConfig", "EnvError", "env_spaces", "make_env"]
