"""What a CUDA kernel costs, from the assembler's own report: no GPU and no driver are needed.

numba compiles to PTX for a compute capability; `ptxas`, the assembler of NVIDIA's toolkit, turns that into machine code
and says how many registers and how much shared memory a block takes and whether registers spill into memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from data_prep.errors import UserError
from pipelines.cuda.launch import cuda

# Of one multiprocessor, by compute capability: bytes of shared memory (CUDA C++ Programming Guide, table of technical
# specifications). Registers (64 Ki), threads (2048) and blocks (32) are the same for these.
SHARED_BYTES = {(8, 0): 164 * 1024, (9, 0): 228 * 1024, (10, 0): 228 * 1024}
REGISTERS, THREADS, BLOCKS, WARP = 65536, 2048, 32, 32


class Assembly(NamedTuple):
    """The assembler's report on one kernel.

    registers are per thread; shared_bytes (static) per block; stack_bytes, spill_stores and spill_loads are bytes per
    thread. ptx is the code that was assembled, assembler the program that did it.
    """

    cc: tuple[int, int]
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    ptx: str
    assembler: str

    def blocks_per_multiprocessor(self, threads: int) -> dict[str, int]:
        """How many blocks of so many threads fit at once, by what limits them; the smallest counts.

        Raises: ValueError for a compute capability whose limits are not known here.
        """
        if self.cc not in SHARED_BYTES:
            raise ValueError(f"limits are known for compute capability {sorted(SHARED_BYTES)}, got {self.cc}")
        warps = -(-threads // WARP)
        per_warp = -(-self.registers * WARP // 256) * 256  # handed out 256 at a time
        shared = -(-self.shared_bytes // 128) * 128 + 1024  # 128 at a time, and 1 KiB a block for the system
        return {
            "threads": THREADS // (warps * WARP),
            "registers": REGISTERS // (max(per_warp, 1) * warps),
            "shared": SHARED_BYTES[self.cc] // shared,
            "blocks": BLOCKS,
        }


def assemble(
    kernel: Callable[..., None], signature: Any, cc: tuple[int, int], launch_bounds: tuple[int, int] | None = None
) -> Assembly:
    """Compile and assemble a kernel.

    Args:
        kernel: the plain Python function, not what `cuda.jit` made of it; it may call device functions.
        signature: numba's types of its arguments, as in `numba.void(numba.uint8[::1], numba.int64)`.
        cc: compute capability, (9, 0) for H100 and H200, (8, 0) for A100.
        launch_bounds: as given to `cuda.jit`: threads of a block, and blocks that shall fit on a multiprocessor.

    Raises: UserError where no assembler is found, or none that is new enough for what numba's compiler writes.
        RuntimeError with the assembler's words when it rejects the code.
    """
    with _device_of(cc):
        ptx, _ = cuda().compile_ptx(kernel, signature, cc=cc, launch_bounds=launch_bounds)
    if isinstance(ptx, bytes):
        ptx = ptx.decode()
    too_old = []
    for program in assemblers():
        done = _run_assembler(program, ptx, cc)
        if "Unsupported .version" in done.stderr:
            too_old.append(program)
            continue
        if done.returncode:
            raise RuntimeError(f"{program} rejects the kernel: {done.stderr.strip() or done.stdout.strip()}")
        return Assembly(cc=cc, ptx=ptx, assembler=program, **_figures(done.stderr + done.stdout))
    version = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
    old = f"those found are too old for PTX {version[1] if version else '?'}: {', '.join(too_old)}"
    raise UserError(
        f"Assembling CUDA code needs ptxas, {old if too_old else 'which was not found'}."
        " Install the one that belongs to numba's compiler: pip install -e '.[cuda]'"
    )


def assemblers() -> Iterator[str]:
    """Every ptxas of this machine: of pip's packages, then of the PATH, then of CUDA_HOME."""
    package = importlib.util.find_spec("nvidia")
    folders = (package.submodule_search_locations or ()) if package else ()
    programs = [str(path) for name in folders for path in sorted(Path(name).glob("*/bin/ptxas"), reverse=True)]
    programs.append(shutil.which("ptxas") or "")
    if os.environ.get("CUDA_HOME"):
        programs.append(os.path.join(os.environ["CUDA_HOME"], "bin", "ptxas"))
    yield from dict.fromkeys(program for program in programs if os.access(program, os.X_OK))


@contextmanager
def _device_of(cc: tuple[int, int]) -> Iterator[None]:
    """Let numba compile device functions for `cc`: it asks the current device for that, and there may be none."""
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(id=0, compute_capability=cc)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def _run_assembler(program: str, ptx: str, cc: tuple[int, int]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [program, "-v", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _figures(words: str) -> dict[str, int]:
    """Read `ptxas -v`: figures it leaves out are 0, except registers, which it always states."""

    def number(pattern: str) -> int:
        match = re.search(pattern, words)
        return int(match[1]) if match else 0

    if not re.search(r"Used \d+ registers", words) or "spill stores" not in words:
        raise RuntimeError(f"the report of ptxas has no figures: {words.strip()}")
    return {
        "registers": number(r"Used (\d+) registers"),
        "shared_bytes": number(r"(\d+) bytes smem"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
    }
