"""What a launch costs the host: nothing is wrapped, sent or compiled twice. What fails is told."""

import gc
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from data_prep.errors import UserError
from pipelines.cuda import launch as cuda_launch
from tests.simulator import run_in_simulator

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

KEPT = """
import gc, torch
from pipelines.cuda import launch
state = torch.arange(6.0).reshape(2, 3)
kept = launch.kept_array(state)
assert launch.kept_array(state) is kept
state += 1
assert kept[1, 2] == 6, "the same memory"
flat = launch.kept_array(state, flat=True)
assert flat.shape == (6,) and launch.kept_array(state, flat=True) is flat
state.set_(torch.zeros(2, 3))
assert launch.kept_array(state)[1, 2] == 0, "of a tensor whose memory is another the array is made anew"
del state
gc.collect()
assert not len(launch._arrays_of), "what is kept does not keep the tensor"
print("kept")
"""


def test_a_tensor_is_wrapped_once():
    assert run_in_simulator(KEPT) == "kept\n"


def test_a_constant_is_copied_once_and_anew_when_it_was_written_to():
    table = torch.arange(3.0)
    copy = cuda_launch.kept_copy(table, CPU)
    assert cuda_launch.kept_copy(table, CPU) is copy
    table[0] = 7
    assert copy[0] == 0, "a copy"
    assert cuda_launch.kept_copy(table, CPU)[0] == 7
    del table
    gc.collect()
    assert not len(cuda_launch._copies_of)


def test_the_operator_hands_its_kernel_the_callers_own_tensors():
    """What is kept is found by the tensor it belongs to."""
    seen = []

    @torch.library.custom_op("semi_fast_test::look", mutates_args=())
    def look(table: torch.Tensor) -> torch.Tensor:
        seen.append(table)
        return table.clone()

    table = torch.zeros(2)
    look(table)
    assert seen[0] is table


def test_a_stream_of_torch_is_one_object_for_numba(monkeypatch):
    made = []
    monkeypatch.setattr(cuda_launch.cuda(), "external_stream", lambda address: made.append(address) or object())
    cuda_launch._stream.cache_clear()
    assert cuda_launch._stream(GPU, 5) is cuda_launch._stream(GPU, 5)
    assert cuda_launch._stream(GPU, 6) is not cuda_launch._stream(torch.device("cuda", 1), 6)
    assert made == [5, 6, 6]
    cuda_launch._stream.cache_clear()


def test_the_plan_travels_with_its_rows_in_one_copy():
    from pipelines.augment.kernel_cuda import _normal, _send

    plan, rows = torch.arange(6, dtype=torch.int32).reshape(2, 3), torch.tensor([9, 8])
    assert _send(plan, rows, CPU).tolist() == [[0, 1, 2, 9], [3, 4, 5, 8]]
    assert _normal((0.5,) * 3, (0.25,) * 3, CPU) is _normal((0.5,) * 3, (0.25,) * 3, CPU)
    assert _normal((0.5,) * 3, (0.25,) * 3, CPU).tolist() == [127.5] * 3 + [pytest.approx(1 / 63.75)] * 3


@pytest.fixture
def faults():
    cuda_launch.fault.cache_clear()
    yield
    cuda_launch.fault.cache_clear()


def test_a_launch_that_fails_is_told_in_one_line(monkeypatch, faults):
    def fail(*_):
        raise RuntimeError("[CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION]\nthe driver is too old")

    monkeypatch.setattr(cuda_launch, "launch", fail)
    told = (
        "numba-cuda cannot launch a kernel "
        "(RuntimeError: [CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION] the driver is too old)"
    )
    assert cuda_launch.fault(GPU) == told
    with pytest.raises(UserError, match="cannot launch a kernel"):
        cuda_launch.require(GPU)


def test_a_launch_that_works_is_tried_once(monkeypatch, faults):
    launched = []
    monkeypatch.setattr(cuda_launch, "launch", lambda kernel, *where: launched.append(where))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: launched.append(device))
    for _ in range(2):
        assert cuda_launch.fault(GPU) is None
        cuda_launch.require(GPU)
    assert launched == [(1, 1, GPU), GPU]


def test_without_numba_cuda_the_fault_says_what_to_install(monkeypatch, faults):
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    cuda_launch.cuda.cache_clear()
    assert "Install it with: pip install -e '.[cuda]'" in str(cuda_launch.fault(GPU))
    cuda_launch.cuda.cache_clear()


CACHED = """
import sys
from types import SimpleNamespace
from types import SimpleNamespace
from unittest import mock
from pipelines.cuda import launch
from pipelines.cuda.report import _device_of
launch.cuda()
from numba.cuda import codegen, dispatcher
here = SimpleNamespace(device=SimpleNamespace(compute_capability=(9, 0)))
if sys.argv[1]:
    numbers = launch.sources_version
    launch.sources_version = lambda *modules: numbers(*modules) + 1
with (
    _device_of((9, 0)),
    mock.patch.object(dispatcher._Kernel, "bind", lambda self: None),
    mock.patch.object(codegen.devices, "get_context", lambda *_: here),
    mock.patch.object(codegen.runtime.runtime, "get_version", lambda: (13, 0)),
):
    from pipelines.augment import kernel_cuda
    kernel = kernel_cuda.kernel(8, 8, False, True)
    made = kernel.compile(kernel_cuda.signature(False))
    assert ".target sm_90" in made.inspect_asm((9, 0))
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def test_without_a_folder_to_write_to_kernels_are_compiled_all_the_same(monkeypatch):
    def jit(**options):
        if "cache" in options:
            raise RuntimeError("cannot cache function 'kernel': no locator available for file 'kernel.py'")
        return lambda kernel: (kernel, options)

    monkeypatch.setattr(cuda_launch, "cuda", lambda: SimpleNamespace(jit=jit))
    monkeypatch.setattr(cuda_launch, "simulated", lambda: False)
    assert cuda_launch.jit_cached(abs, launch_bounds=7) == (abs, {"launch_bounds": 7})


@pytest.mark.slow
def test_a_kernel_is_compiled_once_for_all_processes_until_its_sources_change(root, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    found = []
    for changed in ("", "", "yes"):
        command = [sys.executable, "-W", "ignore", "-c", CACHED, changed]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found == [["0", "1"], ["1", "0"], ["0", "1"]], "hits and misses"


def test_the_version_of_sources_follows_every_module():
    from pipelines.augment import pixel_ops, plan

    versions = {cuda_launch.sources_version(*modules) for modules in ((pixel_ops,), (plan,), (pixel_ops, plan))}
    assert len(versions) == 3
    assert all(0 <= version < 2**60 for version in versions)
