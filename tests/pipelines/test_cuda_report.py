"""The assembler's report, and the promise that numba.cuda is imported only when asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipelines.cuda import launch as cuda_launch
from pipelines.cuda import report as cuda_report
from tests.simulator import run_in_simulator

numba = pytest.importorskip("numba_cuda", reason="numba-cuda is not installed") and pytest.importorskip("numba")

SIGNATURE = "void(uint8[::1], int32[::1])"


cuda = None  # a global, because the simulator puts its own in place of it while a kernel runs


def kernel():
    """Turn a block's bytes around through 96 bytes of shared memory, squared by a device function."""
    global cuda
    cuda = cuda_launch.cuda()
    square = cuda.jit(device=True)(lambda value: value * value)

    def run(source, out):
        shared = cuda.shared.array(96, numba.uint8)
        i = cuda.threadIdx.x
        shared[i] = source[i]
        cuda.syncthreads()
        out[i] = square(numba.int32(shared[95 - i]))

    return run


def program(folder: Path, words: str, code: int = 1) -> str:
    """A file that acts as an assembler: prints `words` and exits with `code`."""
    path = folder / f"ptxas{len(list(folder.iterdir()))}"
    path.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


OLD = "ptxas fatal   : Unsupported .version 9.5; current version is 9.0"


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_a_kernel_is_compiled_and_assembled_without_a_gpu(cc):
    report = cuda_report.assemble(kernel(), SIGNATURE, cc)
    assert f".target sm_{cc[0]}{cc[1]}" in report.ptx
    assert report.shared_bytes == 96
    assert 8 <= report.registers <= 40
    assert (report.stack_bytes, report.spill_stores, report.spill_loads) == (0, 0, 0)


def test_an_assembler_that_is_too_old_is_passed_over(tmp_path, monkeypatch):
    known = list(cuda_report.assemblers())
    old = program(tmp_path, OLD)
    monkeypatch.setattr(cuda_report, "assemblers", lambda: iter([old, *known]))
    assert cuda_report.assemble(kernel(), SIGNATURE, (9, 0)).assembler in known
    monkeypatch.setattr(cuda_report, "assemblers", lambda: iter([old]))
    with pytest.raises(UserError, match=r"too old for PTX \d+\.\d+: .*ptxas0. Install .* pip install"):
        cuda_report.assemble(kernel(), SIGNATURE, (9, 0))


def test_without_an_assembler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda_report, "assemblers", lambda: iter(()))
    with pytest.raises(UserError, match=r"needs ptxas, which was not found\. Install .* pip install"):
        cuda_report.assemble(kernel(), SIGNATURE, (9, 0))


def test_rejected_code_and_reports_without_figures_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_report, "assemblers", lambda: iter([program(tmp_path, "syntax error, line 7")]))
    with pytest.raises(RuntimeError, match="rejects the kernel: syntax error, line 7"):
        cuda_report.assemble(kernel(), SIGNATURE, (9, 0))
    monkeypatch.setattr(cuda_report, "assemblers", lambda: iter([program(tmp_path, "all is well", code=0)]))
    with pytest.raises(RuntimeError, match="no figures: all is well"):
        cuda_report.assemble(kernel(), SIGNATURE, (9, 0))


def test_spills_are_read(tmp_path, monkeypatch):
    words = (
        "ptxas info : Function properties for run\n"
        "    24 bytes stack frame, 40 bytes spill stores, 52 bytes spill loads\n"
        "ptxas info : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 4096 bytes smem"
    )
    monkeypatch.setattr(cuda_report, "assemblers", lambda: iter([program(tmp_path, words, code=0)]))
    report = cuda_report.assemble(kernel(), SIGNATURE, (9, 0))
    figures = (report.registers, report.shared_bytes, report.stack_bytes, report.spill_stores, report.spill_loads)
    assert figures == (255, 4096, 24, 40, 52)


def test_what_fits_on_a_multiprocessor():
    report = cuda_report.Assembly((9, 0), 40, 20_000, 0, 0, 0, "", "")
    # 40 registers x 32 threads = 1280 a warp, 10240 a block of 8 warps; 20000 -> 20096 + 1024 bytes.
    assert report.blocks_per_multiprocessor(256) == {"threads": 8, "registers": 6, "shared": 11, "blocks": 32}
    with pytest.raises(ValueError, match=r"limits are known for .* got \(7, 0\)"):
        report._replace(cc=(7, 0)).blocks_per_multiprocessor(256)


def test_assemblers_are_looked_for_on_the_path_and_in_cuda_home(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    there = tmp_path / "bin" / "ptxas"
    Path(program(tmp_path, "")).rename(there)
    monkeypatch.setenv("PATH", f"{there.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert str(there) in list(cuda_report.assemblers())
    monkeypatch.setenv("PATH", "/nowhere")
    assert str(there) not in list(cuda_report.assemblers())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(there) in list(cuda_report.assemblers())


def test_numba_cuda_that_cannot_be_imported_is_a_users_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    cuda_launch.cuda.cache_clear()
    with pytest.raises(UserError, match=r"import failed \(ModuleNotFoundError: .*\)\. Install it with: pip install"):
        cuda_launch.cuda()


def test_the_cpu_never_imports_numba_cuda(root):
    script = """
import sys
from pipelines.augment.op import augment
from tests.pipelines.view_cases import strong_batch
import pipelines, semi_fast.memory_bank, torch
augment(*strong_batch(), torch.float32, 1)
loaded = [name for name in sys.modules if name.startswith(("numba.cuda", "numba_cuda.numba"))]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=root, check=True, timeout=120)


def test_kernels_run_on_tensors_in_the_simulator():
    script = """
import torch
from pipelines.cuda.launch import launch
from tests.pipelines.test_cuda_report import kernel, cuda_launch
source, out = torch.arange(96, dtype=torch.uint8), torch.zeros(96, dtype=torch.int32)
launch(cuda_launch.cuda().jit(kernel()), 1, 96, source.device, source, out)
assert torch.equal(out, (95 - torch.arange(96, dtype=torch.int32)) ** 2), out
halves = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
assert cuda_launch.device_array(halves).tolist() == [0x3F80] * 3
print("equal")
"""
    assert run_in_simulator(script) == "equal\n"
