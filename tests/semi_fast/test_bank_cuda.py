"""The bank's CUDA kernel: simulated, compiled and assembled without a GPU, and run on one where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from pipelines.cuda import launch as cuda_launch
from pipelines.cuda import report as cuda_report
from semi_fast.memory_bank import bank as bank_module
from tests.semi_fast.bank_cases import as_tensors, assert_same, candidates, pair
from tests.simulator import run_in_simulator

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def needs_numba_cuda():
    """numba.cuda and an assembler, or skip: they belong to the extra `cuda`."""
    try:
        cuda_launch.cuda()
    except UserError as error:
        pytest.skip(str(error))
    if not any(cuda_report.assemblers()):
        pytest.skip("no ptxas on this machine")


def test_in_the_simulator_it_equals_the_plain_loop_to_the_bit():
    needs_numba_cuda()
    assert run_in_simulator("tests.semi_fast.simulated_bank", "25").startswith("ok")


@pytest.mark.slow
def test_in_the_simulator_it_equals_the_plain_loop_over_many_histories():
    needs_numba_cuda()
    assert run_in_simulator("tests.semi_fast.simulated_bank", "300", timeout=1200).startswith("ok")


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_it_assembles_without_spills(cc):
    needs_numba_cuda()
    from numba import boolean, float32, int64, void

    from semi_fast.memory_bank import scatter_cuda

    state = (float32[:, :, ::1], float32[:, ::1], int64[:, ::1], float32[:, ::1], int64[::1], int64[::1])
    offered = (float32[:, ::1], int64[::1], float32[::1], boolean[::1], int64[::1])
    signature = void(*state, *offered, float32, int64, boolean, int64)
    made = cuda_report.assemble(scatter_cuda.build(), signature, cc)
    print(f"bank scatter, sm_{cc[0]}{cc[1]}: {made.registers} registers, {made.shared_bytes} bytes of shared memory")
    assert (made.spill_stores, made.spill_loads, made.stack_bytes) == (0, 0, 0)
    assert min(made.blocks_per_multiprocessor(scatter_cuda.MOST_THREADS).values()) >= 1
    assert ".f64" in made.ptx, "sums are formed anew in float64"
    assert "fma.rn.f32" not in made.ptx, "a fused multiply-add would round once where the plain loop rounds twice"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(40))
def test_a_gpu_keeps_the_same_bank(seed):
    rng = np.random.default_rng(seed)
    classes, width = int(rng.integers(1, 6)), int(rng.choice([1, 33, 128, 700]))
    sizes = {"size": int(rng.choice([1, 2, 7, 128, 600])), "decay_every": int(rng.integers(1, 5))}
    rule = ("confidence", "fifo")[seed % 4 == 3]
    bank, oracle = pair(classes, width, **sizes, rule=rule, resum_every=int(rng.integers(1, 300)))
    bank = bank.cuda()
    for _ in range(6):
        kind = {"levels": int(rng.choice([0, 1, 3, 10**6])), "on": float(rng.choice([0.5, 1.0]))}
        spread = str(rng.choice(["uneven", "one", "even"]))
        step = candidates(rng, int(rng.integers(0, 700)), classes, width, **kind, spread=spread)
        bank.push(*(part.cuda() for part in as_tensors(step)))
        oracle.push(*step)
    assert_same(bank.cpu(), oracle)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", ["confidence", "fifo"])
def test_a_gpu_keeps_the_same_bank_at_the_paper_sizes_without_waiting(rule):
    bank, oracle = pair(10, 128, size=128, decay_every=3, rule=rule, resum_every=200)
    bank, rng = bank.cuda(), np.random.default_rng(0)
    steps = [candidates(rng, 128, 10, 128, levels=10**6, on=0.8) for _ in range(30)]
    on_device = [tuple(part.cuda() for part in as_tensors(step)) for step in steps]
    bank.push(*on_device[0])  # compiles
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):  # the kernel must follow what torch queued there, and come before what it will
            for step in on_device[1:]:
                bank.push(*(part.clone() for part in step))
            stored = bank.embeddings.clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for step in steps:
        oracle.push(*step)
    np.testing.assert_array_equal(stored.cpu().numpy(), oracle.embeddings)
    assert_same(bank.cpu(), oracle)


def test_the_op_has_a_kernel_for_cpu_and_cuda_alone():
    name = bank_module.push._qualname
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
