"""The bank's push for CUDA: one launch a step, a block of threads a class.

Each block looks through all candidates for those of its class, some hundred at a time: its threads read them side by
side, decide in batch order who goes where (only confidences are touched), and then move embeddings and prototype sums,
a thread keeping to its own coordinates. No two blocks touch the same memory and no thread waits for another block, so
the outcome is that of the plain loop, to the bit. Threads of a block meet at barriers and share memory; no instruction
is used that numba's simulator lacks.

Import this module where a CUDA device is at hand (or numba simulates one): numba.cuda needs its libraries to import.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, float32, float64, int32
from torch import Tensor

from pipelines.cuda import launch as cuda_launch
from semi_fast.memory_bank import rules

MOST_THREADS = 512  # of a block: the room its shared arrays have
FEWEST_THREADS = 128

slot_by_confidence = cuda.jit(device=True)(rules.slot_by_confidence)
slot_by_age = cuda.jit(device=True)(rules.slot_by_age)
goes_first = cuda.jit(device=True)(rules.goes_first)
taken_into = cuda.jit(device=True)(rules.taken_into)
exchanged_in = cuda.jit(device=True)(rules.exchanged_in)
resum_due = cuda.jit(device=True)(rules.resum_due)


@cuda.jit(device=True)
def first_lowest(values, low, low_slot):
    """The first slot of the lowest value, the same for all threads; low and low_slot are shared scratch."""
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    cuda.syncthreads()  # what another thread wrote to values counts, and nobody reads the scratch any more
    lowest, slot = values[0], 0
    for other in range(thread, values.size, threads):
        if goes_first(values[other], other, lowest, slot):
            lowest, slot = values[other], other
    low[thread], low_slot[thread] = lowest, slot
    cuda.syncthreads()
    active = threads
    while active > 1:
        half = (active + 1) // 2
        if thread < active - half and goes_first(
            low[thread + half], low_slot[thread + half], low[thread], low_slot[thread]
        ):
            low[thread], low_slot[thread] = low[thread + half], low_slot[thread + half]
        cuda.syncthreads()
        active = half
    return low_slot[0]


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
    """The kernel, for K blocks of at most MOST_THREADS threads; arguments as `push` has them, ``beta`` a float32."""
    k, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    wanted = cuda.shared.array(MOST_THREADS, int32)  # 1 where a candidate of this round is of class k
    queue = cuda.shared.array(MOST_THREADS, int32)  # those candidates, in batch order
    waiting = cuda.shared.array(1, int32)  # how many
    row_of = cuda.shared.array(MOST_THREADS, int32)  # those taken in, and the slots they take
    slot_of = cuda.shared.array(MOST_THREADS, int32)
    low = cuda.shared.array(MOST_THREADS, float32)
    low_slot = cuda.shared.array(MOST_THREADS, int32)
    size, width, count = confidences.shape[1], sums.shape[1], classes.size
    before, calls = pushed[k], steps[k] + 1
    taken = before  # every thread counts along
    lowest_slot = -1  # not known

    for start in range(0, count, threads):
        row = start + thread
        wanted[thread] = 0
        if row < count and mask[row] and classes[row] == k and scores[row] >= 0:
            wanted[thread] = 1
        cuda.syncthreads()
        place = 0
        for other in range(thread):
            place += wanted[other]
        if wanted[thread] == 1:
            queue[place] = row
        if thread == threads - 1:
            waiting[0] = place + wanted[thread]
        cuda.syncthreads()

        round_start = taken
        for i in range(waiting[0]):  # all threads take the same way through this loop
            row = queue[i]
            stored = min(taken, size)
            if fifo:
                slot = slot_by_age(taken, size)
            else:
                if stored == size and lowest_slot < 0:
                    lowest_slot = first_lowest(confidences[k], low, low_slot)
                # Of a class that is not full, no confidence is read.
                lowest = low[0] if stored == size else scores[row]
                slot = slot_by_confidence(stored, size, scores[row], lowest, lowest_slot)
                if slot < 0:
                    continue
                lowest_slot = -1
            if thread == 0:
                confidences[k, slot], rows[k, slot] = scores[row] + float32(0), sources[row]  # -0 becomes 0
                row_of[taken - round_start], slot_of[taken - round_start] = row, slot
            taken += 1
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


_kernel = cuda.jit(scatter)


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
    state, offered = (embeddings, confidences, rows, sums, pushed, steps), (candidates, classes, scores, mask, sources)
    settings = (np.float32(beta), decay_every, fifo, resum_every)
    cuda_launch.launch(_kernel, num_classes, threads, embeddings.device, *state, *offered, *settings)
