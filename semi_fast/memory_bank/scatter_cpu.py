"""The bank's push for the CPU: one compiled call a step, in two passes.

The first pass walks the candidates in batch order and decides who goes where; it touches only confidences and is
cheap. The second moves embeddings and sums, which is nearly all of the work; every coordinate is independent there, so
it runs parallel over blocks of coordinates, which balances however long-tailed the classes are.
"""

from __future__ import annotations

import hashlib
import inspect

import numba
import numpy as np
from numba import carray, njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from semi_fast.memory_bank import rules

PARALLEL_FLOATS = 1 << 18  # candidates' floats from which waking the other threads pays
LINE = 16  # float32 in a cache line: blocks of coordinates never share one

slot_by_confidence = njit(rules.slot_by_confidence)
slot_by_age = njit(rules.slot_by_age)
taken_into = njit(rules.taken_into)
exchanged_in = njit(rules.exchanged_in)
resum_due = njit(rules.resum_due)


@njit
def _first_lowest(values):
    """The first slot of the lowest value. Floats >= 0 are ordered as their bits are, and integer loops vectorize."""
    bits = values.view(np.int32)
    lowest, first = bits[0], np.int32(bits.size)
    for slot in range(bits.size):
        lowest = min(lowest, bits[slot])
    for slot in range(bits.size):  # an early exit would keep this loop from being vectorized
        first = min(first, np.int32(slot) if bits[slot] == lowest else np.int32(bits.size))
    return first


@njit
def _choose(confidences, rows, pushed, classes, scores, mask, sources, fifo, row_of, slot_of, full):
    """Decide the slot of each candidate in batch order; returns how many are taken in.

    Accepted candidate a is row ``row_of[a]`` and goes to ``slot_of[a]``; ``full[a]``: it replaces an entry there.
    """
    num_classes, size = confidences.shape
    lowest_slot = np.full(num_classes, -1)  # -1: not known
    accepted = 0
    for row in range(classes.size):
        if not mask[row]:
            continue
        k = classes[row]
        stored = min(pushed[k], size)
        if fifo:
            slot = slot_by_age(pushed[k], size)
        else:
            if stored == size and lowest_slot[k] < 0:
                lowest_slot[k] = _first_lowest(confidences[k])
            lowest = confidences[k, max(lowest_slot[k], 0)]
            slot = slot_by_confidence(stored, size, scores[row], lowest, lowest_slot[k])
            if slot < 0:
                continue
            lowest_slot[k] = -1
        confidences[k, slot], rows[k, slot] = scores[row] + np.float32(0), sources[row]  # -0 becomes 0
        pushed[k] += 1
        row_of[accepted], slot_of[accepted], full[accepted] = row, slot, stored == size
        accepted += 1
    return accepted


@njit
def _exchange(total, stored, new):
    for j in range(total.size):
        total[j] = exchanged_in(total[j], stored[j], new[j])
        stored[j] = new[j]


@njit
def _take(total, stored, new):
    for j in range(total.size):
        total[j] = taken_into(total[j], new[j])
        stored[j] = new[j]


@njit
def _resum(total, stored):
    exact = np.zeros(total.size, np.float64)
    for slot in range(stored.shape[0]):
        for j in range(total.size):
            exact[j] += stored[slot, j]
    for j in range(total.size):
        total[j] = np.float32(exact[j])


def _push(state, offered, beta, every, fifo, resum, blocks):
    embeddings, confidences, rows, sums, pushed, steps = state
    candidates, classes, scores, mask, sources = offered
    num_classes, size, width = embeddings.shape
    count = classes.size
    for row in range(count):
        if mask[row] and not 0 <= classes[row] < num_classes:
            raise IndexError("class of a candidate is out of range")
        if mask[row] and not scores[row] >= 0:
            raise ValueError("confidence of a candidate is negative or not a number")
    row_of, slot_of, full = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.bool_)
    before = pushed.copy()
    accepted = _choose(confidences, rows, pushed, classes, scores, mask, sources, fifo, row_of, slot_of, full)

    block = -(-width // (blocks * LINE)) * LINE
    for b in prange(blocks):
        low, high = min(width, b * block), min(width, (b + 1) * block)
        for a in range(accepted):
            k = classes[row_of[a]]
            total, stored = sums[k, low:high], embeddings[k, slot_of[a], low:high]
            if full[a]:
                _exchange(total, stored, candidates[row_of[a], low:high])
            else:
                _take(total, stored, candidates[row_of[a], low:high])
        for k in range(num_classes):
            if resum_due(before[k], pushed[k], resum):
                _resum(sums[k, low:high], embeddings[k, : min(pushed[k], size), low:high])

    for k in range(num_classes):
        steps[k] += 1
        if steps[k] % every == 0:
            for slot in range(min(pushed[k], size)):
                confidences[k, slot] *= beta


@intrinsic
def _pointer(typing_context, address, dtype):
    """The int64 ``address`` as a pointer to ``dtype``."""
    pointer = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), generate


@njit
def _arrays(at, shape):
    num_classes, size, width, count = shape
    state = (
        carray(_pointer(at[0], np.float32), (num_classes, size, width)),
        carray(_pointer(at[1], np.float32), (num_classes, size)),
        carray(_pointer(at[2], np.int64), (num_classes, size)),
        carray(_pointer(at[3], np.float32), (num_classes, width)),
        carray(_pointer(at[4], np.int64), (num_classes,)),
        carray(_pointer(at[5], np.int64), (num_classes,)),
    )
    offered = (
        carray(_pointer(at[6], np.float32), (count, width)),
        carray(_pointer(at[7], np.int64), (count,)),
        carray(_pointer(at[8], np.float32), (count,)),
        carray(_pointer(at[9], np.bool_), (count,)),
        carray(_pointer(at[10], np.int64), (count,)),
    )
    return state, offered


_push_serial = njit(_push)
_push_parallel = njit(parallel=True)(_push)


def _entries(version):
    """The compiled entry points, serial and parallel.

    They take addresses, because making eleven numpy arrays of eleven tensors takes longer than a small push. Numba's
    cache looks at this file alone; ``version``, a closure variable and so part of the key, stands for the rules' file.
    """

    @njit(cache=True, nogil=True)
    def serial(at, shape, beta, every, fifo, resum):
        version  # noqa: B018
        state, offered = _arrays(at, shape)
        _push_serial(state, offered, np.float32(beta), every, fifo, resum, 1)

    @njit(cache=True, nogil=True)
    def parallel(at, shape, beta, every, fifo, resum, blocks):
        version  # noqa: B018
        state, offered = _arrays(at, shape)
        _push_parallel(state, offered, np.float32(beta), every, fifo, resum, blocks)

    return serial, parallel


_serial, _parallel = _entries(hashlib.sha256(inspect.getsource(rules).encode()).hexdigest())


def push(
    embeddings: Tensor,
    confidences: Tensor,
    rows: Tensor,
    sums: Tensor,
    pushed: Tensor,
    steps: Tensor,
    candidates: Tensor,
    classes: Tensor,
    scores: Tensor,
    mask: Tensor,
    sources: Tensor,
    beta: float,
    decay_every: int,
    fifo: bool,
    resum_every: int,
) -> None:
    """Push, decay and prototype upkeep of one step; see ``semi_fast.memory_bank.bank.push`` for shapes and meaning."""
    tensors = (embeddings, confidences, rows, sums, pushed, steps, candidates, classes, scores, mask, sources)
    at = tuple([tensor.data_ptr() for tensor in tensors])
    shape = (*embeddings.shape, classes.shape[0])
    if candidates.numel() < PARALLEL_FLOATS:
        _serial(at, shape, beta, decay_every, fifo, resum_every)
    else:
        blocks = min(numba.get_num_threads(), -(-embeddings.shape[2] // LINE))
        _parallel(at, shape, beta, decay_every, fifo, resum_every, blocks)
