import threading
import time

import torch

from dreamer.agent import make_agent
from dreamer.presets import agent_config
from dreamer.spaces import DiscreteAction, VectorSpec
from dreamer.weights import PackedWeights, unpack
from learner.publish import Publisher


def small_agent() -> torch.nn.Module:
    spaces = {"vector": VectorSpec(shape=(3,))}, {"action": DiscreteAction(classes=2)}
    return make_agent(agent_config("v3", "debug"), *spaces)


def publisher(send, agent=None) -> Publisher:  # type: ignore[no-untyped-def]
    return Publisher(agent or small_agent(), send, fence=3, config_hash="x", dtype=torch.float32)


def test_the_hub_gets_the_policy_of_the_moment_of_publishing() -> None:
    agent, sent = small_agent(), list[PackedWeights]()
    release = threading.Event()

    def send(weights: PackedWeights) -> bool:
        release.wait(5)
        sent.append(weights)
        return True

    before = {k: v.clone() for k, v in agent.policy_tensors().items()}  # type: ignore[operator]
    sender = publisher(send, agent)
    assert sender.publish(7)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(1.0)
    release.set()
    assert sender.wait(5)
    assert sent[0].version == (3, 7)
    assert all(torch.equal(v, before[k]) for k, v in unpack(sent[0]).items())
    assert sender.stats.version == (3, 7)


def test_only_one_publication_is_under_way_and_the_caller_never_waits() -> None:
    release = threading.Event()
    sender = publisher(lambda weights: release.wait(5))
    assert sender.publish(1)
    begin = time.monotonic()
    assert not sender.publish(2)
    assert time.monotonic() - begin < 0.1
    release.set()
    assert sender.wait(5)
    assert sender.publish(3)
    assert sender.wait(5)
    assert sender.stats.published == 2


def test_weights_that_arrived_although_their_delivery_failed_count_when_sent_again() -> None:
    answers: list[Exception | bool] = [TimeoutError("the answer was lost"), False]

    def send(weights: PackedWeights) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    sender = publisher(send)
    assert sender.publish(0) and sender.wait(5)
    assert sender.stats.failed == (3, 0)
    assert sender.publish(0) and sender.wait(5)
    assert sender.stats.failed is None
    assert sender.stats.version == (3, 0)


def test_a_refusal_and_an_outage_are_counted_and_survived() -> None:
    def broken(weights: PackedWeights) -> bool:
        raise ConnectionError("the hub is away")

    for send in (broken, lambda weights: False):
        sender = publisher(send)
        assert sender.publish(1)
        assert sender.wait(5)
        assert sender.stats.rejected == 1
        assert sender.stats.version == (0, -1)
