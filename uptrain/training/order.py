"""The order in which blocks of text are trained on: a pure function of a seed."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from uptrain.errors import DataError

_LONGEST_PERIOD = 100_000

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """An infinite order of the blocks of one or several pools.

    A schedule says which pool each place belongs to; a pool fills its places with one permutation
    of all its blocks after another, each drawn from (seed, epoch, pool).
    """

    blocks: tuple[int, ...]
    """Number of blocks in each pool, at least 1."""
    shares: tuple[int, ...]
    """Places of each pool in one period of the schedule."""
    seed: int
    _drawn: dict[int, tuple[int, npt.NDArray[np.uint32]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """For each pool the last permutation and its epoch."""

    def take(self, start: int, stop: int) -> tuple[_Ints, _Ints]:
        """Give the pools and the blocks within them of places [start, stop)."""
        rounds, places = np.divmod(np.arange(start, stop), sum(self.shares))
        pools = self._schedule[0][places]
        blocks = np.empty_like(pools)
        for pool in np.unique(pools).tolist():
            here = pools == pool
            turns = rounds[here] * self.shares[pool] + self._schedule[1][places[here]]
            epochs, turns = np.divmod(turns, self.blocks[pool])
            chosen = np.empty_like(turns)
            for epoch in np.unique(epochs).tolist():
                chosen[epochs == epoch] = self._permutation(pool, epoch)[turns[epochs == epoch]]
            blocks[here] = chosen
        return pools, blocks

    def counts(self, places: int) -> list[int]:
        """How many of the first places each pool has; less than 1 from its exact part."""
        rounds, rest = divmod(places, sum(self.shares))
        started = np.bincount(self._schedule[0][:rest], minlength=len(self.shares)).tolist()
        return [rounds * share + n for share, n in zip(self.shares, started, strict=True)]

    @cached_property
    def _schedule(self) -> tuple[_Ints, _Ints]:
        """One period: the pool of each place, and how many places of that pool come before."""
        pools = schedule(self.shares)
        before = np.empty_like(pools)
        for pool, share in enumerate(self.shares):
            before[pools == pool] = np.arange(share)
        return pools, before

    def _permutation(self, pool: int, epoch: int) -> npt.NDArray[np.uint32]:
        drawn = self._drawn.get(pool)
        if drawn is None or drawn[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch, pool]))
            blocks = np.arange(self.blocks[pool], dtype=np.uint32)
            drawn = self._drawn[pool] = epoch, generator.permutation(blocks)
        return drawn[1]


def schedule(shares: Sequence[int]) -> _Ints:
    """Spread the places of a period over pools as evenly as can be.

    Block j of pool i may take a place once i's part of the places, exactly n · shares[i] / sum,
    has begun to ask for it, and has to by the time that part has come to it whole. Of the pools
    that may, the one that has to first takes the place. All are then in time, so that after n
    places no pool is a whole place from its part.

    Args:
        shares: Places of each pool, at least 1.

    Returns:
        [sum(shares)] pools.

    Source:
        Baruah, Cohen, Plaxton, Varvel: Proportionate progress (1996); Tijdeman: The chairman
        assignment problem (1980).
    """
    period = sum(shares)
    taken = [0] * len(shares)
    waiting = [(0, pool) for pool in range(len(shares))]
    due: list[tuple[int, int]] = []
    pools = np.empty(period, np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            pool = heapq.heappop(waiting)[1]
            deadline = -(-(taken[pool] + 1) * period // shares[pool])
            heapq.heappush(due, (deadline, pool))
        pool = heapq.heappop(due)[1]
        pools[place] = pool
        taken[pool] += 1
        heapq.heappush(waiting, (taken[pool] * period // shares[pool], pool))
    return pools


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Turn weights into whole numbers in the same proportion, to a hundred-thousandth.

    Raises:
        DataError: If a weight is too small beside the others.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [weight / sum(exact) for weight in exact]
    period = min(math.lcm(*(part.denominator for part in parts)), _LONGEST_PERIOD)
    shares = [int(part * period) for part in parts]
    # What rounding down has left goes to those that lost most.
    lost = sorted(range(len(parts)), key=lambda i: shares[i] - parts[i] * period)
    for pool in lost[: period - sum(shares)]:
        shares[pool] += 1
    if 0 in shares:
        raise DataError(
            f"data.train: a weight of {weights[shares.index(0)]:g} is less than "
            f"1/{_LONGEST_PERIOD} of all; raise it, or leave the source out"
        )
    return tuple(shares)
