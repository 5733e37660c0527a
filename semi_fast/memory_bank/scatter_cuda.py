"""The bank's push for CUDA: one launch a step, a block of threads a class.

Each block looks through all candidates for those of its class, some hundred at a time: its threads read them side by
side, decide who goes where (only confidences are touched), and then move embeddings and prototype sums in batch order,
a thread keeping to its own coordinates. No two blocks touch the same memory and no thread waits for another block, so
the outcome is that of the plain loop, to the bit. Threads of a block meet at barriers and share memory; no instruction
is used that numba's simulator lacks.

Who goes where is decided for many candidates at once. In a full class of S entries a candidate is taken in where fewer
than S of the entries and the candidates before it are at least as confident: whatever was thrown out or dropped
meanwhile was less confident than S others, and changes no such count. The lowest entry goes each time and what comes is
above it, so that the o-th to be taken in takes the place of the o-th lowest entry (of equal ones the lower slot first),
as long as none of those that came before it in the same turn is as low as that; with the first one of which that is not
true, the next turn begins.

Import this module where a CUDA device is at hand (or numba simulates one): numba.cuda needs its libraries to import.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float32, float64, int32
from torch import Tensor

from pipelines.cuda import launch as cuda_launch
from semi_fast.memory_bank import rules

MOST_THREADS = 512  # of a block: the room its shared arrays have
FEWEST_THREADS = 128
SCRATCH = MOST_THREADS + 2  # of a turn: a flag a thread, its end, and how many were taken in
VERSION = cuda_launch.sources_version(rules)

slot_by_age = cuda.jit(device=True)(rules.slot_by_age)
goes_first = cuda.jit(device=True)(rules.goes_first)
taken_into = cuda.jit(device=True)(rules.taken_into)
exchanged_in = cuda.jit(device=True)(rules.exchanged_in)
resum_due = cuda.jit(device=True)(rules.resum_due)


@cuda.jit(device=True)
def count_before(flags, place):
    """How many of flags[:place] are 1."""
    count = 0
    for other in range(place):
        count += flags[other]
    return count


@cuda.jit(device=True)
def replace_lowest(confidences, scores, sources, rows, queue, at, waiting, taken, row_of, slot_of, scratch, order):
    """Let candidates queue[at:waiting] into a full class, as many as one turn can decide.

    Args:
        confidences, rows: (S,) of the class.
        taken: of this round before the turn, the end of row_of and slot_of.
        scratch: (threads + 2) int32, order: (threads) int32, both shared.

    Returns: the first candidate that is not decided, and how many were taken in; the same for all threads.
    """
    thread, threads, size = cuda.threadIdx.x, cuda.blockDim.x, confidences.size
    mine = at + thread
    scratch[thread] = 0
    if mine < waiting:
        score, above = scores[queue[mine]], 0
        for slot in range(size):
            above += confidences[slot] >= score
        for other in range(at, mine):
            above += scores[queue[other]] >= score
        scratch[thread] = above < size
    if thread == 0:
        scratch[threads] = waiting
    cuda.syncthreads()
    accepted = scratch[thread] == 1
    turn, offered = count_before(scratch, thread), count_before(scratch, min(threads, waiting - at))
    for slot in range(thread, size, threads):
        rank = 0
        for other in range(size):
            rank += goes_first(confidences[other], other, confidences[slot], slot)
        if rank < offered:
            order[rank] = slot
    cuda.syncthreads()
    if accepted:
        clear = turn < size
        for other in range(at, mine):
            if clear and scratch[other - at] == 1:
                clear = confidences[order[turn]] < scores[queue[other]]
        if not clear:
            cuda.atomic.min(scratch, threads, mine)
    cuda.syncthreads()
    end = scratch[threads]
    if thread == 0:
        scratch[threads + 1] = count_before(scratch, min(threads, end - at))
    if accepted and mine < end:
        row, slot = queue[mine], order[turn]
        confidences[slot], rows[slot] = scores[row] + float32(0), sources[row]  # -0 becomes 0
        row_of[taken + turn], slot_of[taken + turn] = row, slot
    cuda.syncthreads()
    return end, scratch[threads + 1]


@cuda.jit(device=True)
def scatter(
    embeddings,
    confidences,
    rows,
    sums,
    pushed,
    steps,
    candidates,
    classes,
    scores,
    mask,
    sources,
    beta,
    every,
    fifo,
    resum,
):
    """What the kernel does, in K blocks of at most MOST_THREADS threads; arguments as `push` has them, ``beta`` a
    float32."""
    k, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    wanted = cuda.shared.array(MOST_THREADS, int32)  # 1 where a candidate of this round is of class k
    queue = cuda.shared.array(MOST_THREADS, int32)  # those candidates, in batch order
    waiting = cuda.shared.array(1, int32)  # how many
    row_of = cuda.shared.array(MOST_THREADS, int32)  # those taken in, and the slots they take
    slot_of = cuda.shared.array(MOST_THREADS, int32)
    scratch = cuda.shared.array(SCRATCH, int32)
    size, width, count = confidences.shape[1], sums.shape[1], classes.size
    before, calls = pushed[k], steps[k] + 1
    taken = before  # every thread counts along

    for start in range(0, count, threads):
        row = start + thread
        wanted[thread] = 0
        if row < count and mask[row] and classes[row] == k and scores[row] >= 0:
            wanted[thread] = 1
        cuda.syncthreads()
        place = count_before(wanted, thread)
        if wanted[thread] == 1:
            queue[place] = row
        if thread == threads - 1:
            waiting[0] = place + wanted[thread]
        cuda.syncthreads()

        round_start, at = taken, 0
        while at < waiting[0]:  # all threads take the same way through this loop
            if not fifo and taken >= size:
                at, more = replace_lowest(
                    confidences[k], scores, sources, rows[k], queue, at, waiting[0], taken - round_start,
                    row_of, slot_of, scratch, wanted,
                )  # fmt: skip
            else:  # free slots, or the oldest ones: each once in a turn
                more = min(waiting[0] - at, size if fifo else size - taken)
                if thread < more:
                    row, slot = queue[at + thread], slot_by_age(taken + thread, size)
                    confidences[k, slot], rows[k, slot] = scores[row] + float32(0), sources[row]  # -0 becomes 0
                    row_of[taken - round_start + thread], slot_of[taken - round_start + thread] = row, slot
                at += more
                cuda.syncthreads()
            taken += more
        cuda.syncthreads()

        for j in range(thread, width, threads):
            total = sums[k, j]
            for a in range(taken - round_start):
                new, slot = candidates[row_of[a], j], slot_of[a]
                if round_start + a < size:
                    total = taken_into(total, new)
                else:
                    total = exchanged_in(total, embeddings[k, slot, j], new)
                embeddings[k, slot, j] = new
            sums[k, j] = total
        cuda.syncthreads()

    if resum_due(before, taken, resum):
        for j in range(thread, width, threads):
            exact = float64(0.0)
            for slot in range(min(taken, size)):
                exact += embeddings[k, slot, j]
            sums[k, j] = exact
    if calls % every == 0:
        for slot in range(thread, min(taken, size), threads):
            confidences[k, slot] *= beta
    cuda.syncthreads()  # every thread has read what the first one now writes
    if thread == 0:
        pushed[k], steps[k] = taken, calls


def build() -> Any:
    """The kernel, as plain Python."""
    version = VERSION

    def run(
        embeddings, confidences, rows, sums, pushed, steps, candidates, classes, scores, mask, sources, beta, every,
        fifo, resum,
    ):  # fmt: skip
        version  # noqa: B018
        scatter(
            embeddings, confidences, rows, sums, pushed, steps, candidates, classes, scores, mask, sources, beta, every,
            fifo, resum,
        )  # fmt: skip

    return run


_kernel = cuda_launch.jit_cached(build())


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
    """Push, decay and prototype upkeep of one step; see ``semi_fast.memory_bank.bank.push`` for shapes and meaning.

    Queued on torch's current stream; the host does not wait, so nothing can be raised for what the candidates hold: one
    with a class out of range, or a confidence that is negative or NaN, is dropped.
    """
    num_classes, _, width = embeddings.shape
    threads = min(MOST_THREADS, max(FEWEST_THREADS, -(-width // 32) * 32))
    state = [cuda_launch.kept_array(tensor) for tensor in (embeddings, confidences, rows, sums, pushed, steps)]
    offered = (candidates, classes, scores, mask, sources)
    settings = (np.float32(beta), decay_every, fifo, resum_every)
    cuda_launch.launch(_kernel, num_classes, threads, embeddings.device, *state, *offered, *settings)
