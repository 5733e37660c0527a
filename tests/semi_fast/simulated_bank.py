"""The CUDA kernel of the memory bank in numba's simulator against the plain loop; see `tests.simulator`.

python -m tests.semi_fast.simulated_bank EXAMPLES
"""

from __future__ import annotations

import sys
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba.cuda.simulator import kernelapi

from pipelines.cuda import launch as cuda_launch
from semi_fast.memory_bank import MemoryBank, scatter_cuda
from semi_fast.memory_bank.bank import MUTATED
from tests.semi_fast.bank_cases import as_tensors, assert_same, candidates, pair
from tests.semi_fast.bank_histories import Case, cases

ran = {"pushes": 0, "rounds": 0, "replaced": 0, "resummed": 0}


def push(bank: MemoryBank, step, threads: int) -> None:
    """One launch on CPU tensors, with few threads: each is a thread of Python here."""
    state = [getattr(bank, name) for name in MUTATED]
    numbers = (np.float32(bank.beta), bank.decay_every, bank.rule == "fifo", bank.RESUM_EVERY)
    cuda_launch.launch(
        scatter_cuda._kernel, len(bank.steps), threads, bank.sums.device, *state, *as_tensors(step), *numbers
    )


def compare(case: Case, threads: int) -> None:
    for step in case.steps:
        push(case.bank, step, threads)
        case.oracle.push(*step)
        assert_same(case.bank, case.oracle)
        ran["pushes"] += 1
        ran["rounds"] += len(step[1]) > threads
    ran["replaced"] += any(taken > case.oracle.size for taken in case.oracle.taken)
    ran["resummed"] += any(taken > case.oracle.resum_every for taken in case.oracle.taken)


def barriers(count: int) -> int:
    """How often 12 threads meet a barrier in a push of so many candidates, all of which a full class takes in."""
    bank, oracle = pair(1, 2, size=12, decay_every=99)
    rng, met, meet = np.random.default_rng(0), [], kernelapi.FakeCUDAModule.syncthreads
    full, better = candidates(rng, 12, 1, 2, levels=1, on=1.0), candidates(rng, count, 1, 2, levels=1, on=1.0)
    full[2][:] = np.linspace(0.1, 0.4, 12)
    with mock.patch.object(kernelapi.FakeCUDAModule, "syncthreads", lambda self: met.append(meet(self))):
        for step in (full, better):
            met.clear()
            push(bank, step, 12)
            oracle.push(*step)
    assert_same(bank, oracle)
    return len(met)


def main() -> None:
    assert cuda_launch.simulated()

    # One thread is fast here and tells most; several show that they keep out of each other's way.
    @settings(
        max_examples=int(sys.argv[1]), deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck
    )
    @given(
        case=cases(most_classes=3, most_rows=12, most_steps=4, widths=(1, 3, 5)),
        threads=st.sampled_from([1, 1, 1, 2, 3]),
    )
    def equals_the_plain_loop(case, threads):
        compare(case, threads)

    equals_the_plain_loop()

    rng = np.random.default_rng(0)
    bank, oracle = pair(2, 3, size=4, decay_every=1, resum_every=20, beta=0.01)
    for turn in range(60):  # confidences decay to nothing, and fill again
        step = candidates(rng, 4 if turn % 40 == 0 else 0, 2, 3, levels=9, on=1.0)
        push(bank, step, 1)
        oracle.push(*step)
        assert_same(bank, oracle)

    bank, oracle = pair(2, 1, size=2, decay_every=9)
    bad = candidates(rng, 6, 2, 1, levels=9, on=1.0)
    bad[1][:2], bad[2][2], bad[2][3] = (-1, 2), np.nan, -0.5
    push(bank, bad, 2)
    oracle.push(*(part[4:] for part in bad))
    assert_same(bank, oracle)  # what cannot be stored is dropped

    assert barriers(4) == barriers(12), "a class is decided at once, however many it takes in"

    assert all(ran.values()), ran
    print("ok", ran)


if __name__ == "__main__":
    main()
