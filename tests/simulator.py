"""Runs Python in numba's CUDA simulator: a process of its own, because the simulator is chosen at numba's import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_in_simulator(script: str, *arguments: str, timeout: float = 300) -> str:
    """Run `script`, Python source or the name of a module (such as "tests.pipelines.simulated"), and return its output.

    The simulator runs 300 to 500 threads a second where a kernel synchronizes: use few images and small blocks.

    Raises: AssertionError with both outputs when it exits with anything but 0.
    """
    how = ["-m", script] if script.replace(".", "").replace("_", "").isalnum() else ["-c", script]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *how, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
