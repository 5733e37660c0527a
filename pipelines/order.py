"""Which image is read when, and with which random numbers: pure functions of (n, seed, part, step, rank, world).

Nothing here keeps state, so a run resumes at any step, and every rank and every back end reads the same order.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# First number of every seed sequence, so that the order and the plans of a run never share random numbers.
_ORDER, _PLAN, _BALANCED = 1, 2, 3


def part_number(stream: str) -> int:
    """The number by which a stream takes part in every seed: it must not change, or runs could not be repeated."""
    return {"labeled": 0, "unlabeled": 1}.get(stream, 2 + zlib.crc32(stream.encode()))


@lru_cache(maxsize=16)
def permutation(n: int, seed: int, part: int, epoch: int) -> NDArray[np.int64]:
    """A random order of 0..n-1 for one epoch of one part: (n,) int64, read-only."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((_ORDER, seed, part, epoch))))
    order = generator.permutation(n)
    order.flags.writeable = False
    return order


def positions(step: int, batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """Positions in the endless order that this rank reads at this step: (batch,) int64. `batch` is per rank."""
    first = (step * world + rank) * batch
    return np.arange(first, first + batch, dtype=np.int64)


def indices_at(n: int, step: int, batch: int, *, seed: int, part: int, rank: int, world: int) -> NDArray[np.int64]:
    """Indices into the n images of a stream for one step: (batch,) int64 in [0, n).

    Position p belongs to epoch p // n and takes image permutation(epoch)[p % n]: every image comes exactly once an
    epoch over all ranks together, and a batch larger than n wraps around into the next epochs.
    """
    epochs, within = np.divmod(positions(step, batch, rank, world), n)
    chosen = np.empty(batch, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        chosen[here] = permutation(n, seed, part, epoch)[within[here]]
    return chosen


class ByClass(NamedTuple):
    """The images of each class that has any: `indices[first[k] : first[k] + counts[k]]` are those of the k-th one."""

    indices: NDArray[np.int64]  # (n,)
    first: NDArray[np.int64]  # (classes with images,)
    counts: NDArray[np.int64]  # (classes with images,)


def by_class(labels: NDArray[np.int64]) -> ByClass:
    """Images 0..n-1 sorted by their labels (n,)."""
    indices = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[indices], return_index=True, return_counts=True)
    return ByClass(indices, first, counts)


def balanced_at(
    classes: ByClass, step: int, batch: int, *, seed: int, part: int, rank: int, world: int
) -> NDArray[np.int64]:
    """Indices of images drawn with replacement for one step, classes in balance: (batch,) int64.

    A class is drawn uniformly among those with images, then one of its images uniformly. All ranks draw the same
    `world * batch` pairs and use those of their share, so that the global batch does not depend on their number.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((_BALANCED, seed, part, step))))
    which, image = generator.random((world * batch, 2))[rank * batch : (rank + 1) * batch].T
    drawn = (which * len(classes.first)).astype(np.int64)
    return classes.indices[classes.first[drawn] + (image * classes.counts[drawn]).astype(np.int64)]


def plan_seed(seed: int, part: int, step: int) -> int:
    """Seed (63 bits) of the torch.Generator that draws the plans of one stream at one step, the same on every rank."""
    state = np.random.SeedSequence((_PLAN, seed, part, step)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
