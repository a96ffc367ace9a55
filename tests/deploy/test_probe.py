import os
import signal

import pytest

from actors.envs import EnvConfig
from deploy.config import ConfigError
from deploy.probe import probe
from dreamer.spaces import DiscreteAction, VectorSpec

pytestmark = pytest.mark.integration

CARTPOLE = "CartPole-v1"


class Hangs:
    def __init__(self) -> None:
        signal.pause()


class Dies:
    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


def test_the_spaces_of_an_environment_are_found_out() -> None:
    facts = probe(CARTPOLE, EnvConfig())
    assert facts.obs_space == {"vector": VectorSpec(shape=(4,))}
    assert facts.action_space == {"action": DiscreteAction(classes=2)}
    assert facts.action_repeat == 1


def test_an_unknown_environment_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="NoSuchEnv"):
        probe("NoSuchEnv-v0", EnvConfig())


def test_an_environment_that_crashes_says_by_which_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    with pytest.raises(ConfigError, match="SIGSEGV"):
        probe("test_probe:Dies", EnvConfig())


def test_an_environment_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    with pytest.raises(ConfigError, match=r"did not start within 5 s.*check-env"):
        probe("test_probe:Hangs", EnvConfig(), timeout_s=5.0)
