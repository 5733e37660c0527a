"""Which image is read when, and with which random numbers: pure functions of (n, seed, part, step, rank, world).

Nothing here keeps state, so a run resumes at any step, and every rank and every back end reads the same order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# First number of every seed sequence, so that the order and the plans of a run never share random numbers.
_ORDER, _PLAN = 1, 2


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, part: int, epoch: int) -> NDArray[np.int64]:
    """A random order of 0..n-1 for one epoch of one part: (n,) int64, read-only."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((_ORDER, seed, part, epoch))))
    order = generator.permutation(n)
    order.flags.writeable = False
    return order


def positions(step: int, batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """Places in the endless order that this rank reads at this step: (batch,) int64. `batch` is per rank."""
    first = (step * world + rank) * batch
    return np.arange(first, first + batch, dtype=np.int64)


def indices_at(n: int, step: int, batch: int, *, seed: int, part: int, rank: int, world: int) -> NDArray[np.int64]:
    """Indices into the n images of a part for one step: (batch,) int64 in [0, n).

    Place p belongs to epoch p // n and takes image permutation(epoch)[p % n]: every image comes exactly once an epoch
    over all ranks together, and a batch larger than n wraps around into the next epochs.
    """
    place = positions(step, batch, rank, world)
    epoch, within = np.divmod(place, n)
    chosen = np.empty(batch, np.int64)
    for e in range(int(epoch[0]), int(epoch[-1]) + 1):
        here = epoch == e
        chosen[here] = permutation(n, seed, part, e)[within[here]]
    return chosen


def plan_seed(seed: int, part: int, step: int) -> int:
    """Seed (63 bits) of the torch.Generator that draws the plan of one part at one step, the same on every rank."""
    state = np.random.SeedSequence((_PLAN, seed, part, step)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
