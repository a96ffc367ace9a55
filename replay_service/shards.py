"""Several servers for one replay: which of them a stream belongs to, and who may insert how much.

::

    streams ─ rendezvous hash ─▶ shard 0 ─ log ─┐
                             └─▶ shard 1 ─ log ─┴─▶ one mirror ─▶ learner
    budget of all = i0 + ⌊(S + tol_i) / r⌋ ≥ Σ budget of each
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from replay_service.errors import ReplayConfigError

_BETWEEN = re.compile(r"[,;\s]+(?=(?:redis|rediss|unix)://|embedded(?:[,;\s]|$))")


def split_addresses(text: str) -> tuple[str, ...]:
    """Return the addresses of ``redis://a:1,redis://b:2``; a single one gives itself.

    Raises:
        ReplayConfigError: an address is named twice.
    """
    found = tuple(part for part in _BETWEEN.split(text.strip().rstrip(",;")) if part)
    twice = sorted({one for one in found if found.count(one) > 1})
    if twice:
        raise ReplayConfigError(
            f"{', '.join(twice)} is named more than once, and a server is one shard: name each once"
        )
    return found


def shard_of(stream: str, addresses: Sequence[str]) -> str:
    """Return the address that a stream belongs to: the one with the highest random weight.

    The order of the addresses does not matter. One that is added takes its share of the streams
    from all others, and no stream moves between those.

    Args:
        stream: any name; streams that should stay together give the same one.
        addresses: of all shards, at least one.
    """
    assert addresses, "there is no shard"
    return max(addresses, key=lambda address: (_weight(stream, address), address))


def _weight(stream: str, address: str) -> int:
    # Both parts are hashed by themselves, so that no two pairs are the same text.
    parts = b"".join(
        hashlib.blake2b(x.encode(), digest_size=16).digest() for x in (stream, address)
    )
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest())


@dataclass
class _Share:
    committed: int
    """Steps that are known to be inserted."""
    acknowledged: int
    """Budget that the shard is known to have had last."""
    sent: int | None = None
    """Largest budget that was sent since then, and may be in force."""
    recent: float = 0.0
    """Steps inserted lately; older ones count less."""

    @property
    def reserved(self) -> int:
        """Steps that this shard may have inserted by the time that it is heard of again."""
        return max(self.committed, self.acknowledged, self.sent or 0)


class BudgetSplit:
    """Shares a budget out over several shards, which admit inserts on their own.

    Guarantees:
        1. The budgets that may be in force never exceed the total together, whatever messages and
           answers are lost or late: what one shard gains, another has acknowledged to have lost.
           They can only where the total itself falls below what is inserted (a learner that went
           back to an older checkpoint), or a server forgets a smaller budget in a power cut; then
           nothing is raised until they fit again.
        2. A shard that does not answer keeps what it may have, so the others need not know whether
           it lives.
        3. What a shard has not used it keeps, up to a chunk or its even part, whichever is more;
           the rest goes where inserts were lately. So nobody is starved by busier shards.

    It sends nothing itself: send what `lowered` says, then what `raised` says, and tell it what was
    `sent` and `heard`. Not safe for several threads.

    Args:
        budgets, committed: of each shard, as its learner has found them.
        chunk_steps: what one insert may bring.
    """

    _MEMORY = 0.9
    """Share of a shard's recent inserts that still counts at the next settlement."""

    def __init__(
        self, budgets: Sequence[int], committed: Sequence[int], *, chunk_steps: int
    ) -> None:
        self._chunk_steps = chunk_steps
        pairs = zip(budgets, committed, strict=True)
        self._shares = [_Share(inserted, budget) for budget, inserted in pairs]

    def join(self, budget: int, committed: int) -> None:
        """Take one shard more, with the budget that is in force there and what it has inserted.

        It gets more than that only out of what the total leaves over, or others have given up.
        """
        self._shares.append(_Share(committed, budget))

    @property
    def committed(self) -> int:
        """Steps that are known to be inserted, over all shards."""
        return sum(share.committed for share in self._shares)

    def inserted(self, shard: int) -> int:
        """Return the steps that a shard is known to have inserted."""
        return self._shares[shard].committed

    def reserved(self, shard: int) -> int:
        """Return the steps that a shard may have inserted by the time that it is heard of again."""
        return self._shares[shard].reserved

    def goals(self, total: int, asked: Collection[int]) -> dict[int, int]:
        """Return what each shard of those that can be asked should have.

        Args:
            total: of all shards.
            asked: shards that can be told; the others keep what they may have.
        """
        kept = sum(
            share.committed if shard in asked else share.reserved
            for shard, share in enumerate(self._shares)
        )
        free = max(total - kept, 0)
        even = free // len(self._shares)
        # Else busy shards would use up their larger parts of every credit, and one whose writers
        # wait would never come to a whole chunk.
        most = max(even, self._chunk_steps)
        saved = {shard: min(self._unspent(shard), most) for shard in asked}
        if sum(saved.values()) > free:
            saved = dict.fromkeys(asked, even)
        rest = free - sum(saved.values())
        # A shard without any insert may be one whose writers wait: it is never left out.
        weights = {shard: round(self._shares[shard].recent) + self._chunk_steps for shard in asked}
        whole = sum(weights.values())
        given = {shard: saved[shard] + rest * part // whole for shard, part in weights.items()}
        if given:
            # What rounding leaves over: else the one with the least might never come to a chunk.
            given[min(given, key=given.__getitem__)] += free - sum(given.values())
        return {shard: self._shares[shard].committed + steps for shard, steps in given.items()}

    def _unspent(self, shard: int) -> int:
        return self.reserved(shard) - self._shares[shard].committed

    def lowered(self, goals: Mapping[int, int]) -> dict[int, int]:
        """Return the budgets of those shards that get less than they may have: send them first."""
        return {shard: goal for shard, goal in goals.items() if goal < self.reserved(shard)}

    def raised(self, goals: Mapping[int, int], total: int) -> dict[int, int]:
        """Return the budgets of the other shards, as far as what was given up by now allows it."""
        free, found = total - sum(share.reserved for share in self._shares), {}
        for shard, goal in goals.items():
            more = max(min(goal - self.reserved(shard), free), 0)
            free -= more
            found[shard] = self.reserved(shard) + more
        return found

    def sent(self, shard: int, budget: int) -> None:
        """Note that a budget is on its way, and may be in force from now on."""
        share = self._shares[shard]
        share.sent = max(budget, share.sent or 0)

    def heard(self, shard: int, budget: int, committed: int) -> None:
        """Note the answer to the last budget that was sent to a shard, and what it has inserted."""
        share = self._shares[shard]
        fresh = max(committed - share.committed, 0)
        share.recent = share.recent * self._MEMORY + fresh
        share.committed, share.acknowledged, share.sent = committed, budget, None
