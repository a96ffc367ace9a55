from __future__ import annotations

import logging

import pytest
import redis

from replay_service import ByteBudget, EmbeddedServer, ReplayClient


def test_a_budget_warns_at_80_percent_and_names_the_option_at_95(
    caplog: pytest.LogCaptureFixture,
) -> None:
    budget = ByteBudget("server", "raise --replay.redis-memory-bytes")

    def said(used: int) -> list[int]:
        caplog.clear()
        budget.watch(used, 100)
        return [record.levelno for record in caplog.records]

    assert said(79) == []
    assert said(80) == [logging.WARNING] and said(90) == [] and said(78) == [] and said(85) == []
    assert said(95) == [logging.ERROR] and "--replay.redis-memory-bytes" in caplog.text
    assert said(99) == [] and said(85) == [] and said(96) == []
    assert said(74) == [] and said(81) == [logging.WARNING]
    assert budget.watch(10, 0) == 0.0, "no limit is never used up"


def test_the_server_says_how_much_memory_it_uses(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    before, limit = client.memory()
    assert limit == server.max_memory_bytes and before > 0
    with redis.Redis.from_url(server.url) as admin:
        admin.set("filler", bytes(10**7))
    # The server may have freed a buffer of a connection in between.
    assert client.memory()[0] >= before + 9 * 10**6
