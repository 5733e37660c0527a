"""From command to first step, and from last step to prompt: `python -m benchmarks.startup`.

A run of digits is started by Python and by `accelerate launch`, in turns with `import torch` alone, and each line that
it prints is stamped as it comes: wall seconds, and processor seconds of all its processes, which other work on the
machine changes less. Of all rounds the fastest counts. `over_torch` is the time to the first step over the reference.
Before the first round a run that is not timed builds the data set and compiles the kernels.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import psutil

from benchmarks.common import ROOT, report

STEPS = 4
# A line's beginning, and the part of the run that ends with it.
PARTS = {
    "data:": "imports, settings, data, loaders",
    "ceiling:": "optimizer, averages, ceiling",
    "step 1/": "first step",
    f"step {STEPS - 1}/": "further steps",
    f"step {STEPS}/": "last step and evaluation",
    "result:": "checkpoint and report",
    "": "exit",  # the end of its output
}
SETTINGS = [f"steps={STEPS}", "log_every=1", f"eval_every={STEPS}", "wandb=off"]
PYTHON = [sys.executable, str(ROOT / "semi_fast/train.py")]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate.yaml")]
COMMANDS = {"python": PYTHON, "accelerate": [sys.executable, *LAUNCH, PYTHON[1]]}
Times = dict[str, tuple[float, float]]


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="further settings of the run: threads=1")
    arguments = parser.parse_args()
    torch = [sys.executable, "-c", "import torch, os; os._exit(0)"]
    cases = {name: [*command, *SETTINGS, *arguments.settings] for name, command in COMMANDS.items()}
    best: dict[str, list[Times]] = {name: [] for name in (*cases, "torch")}
    with tempfile.TemporaryDirectory() as folder:
        stamped(cases["python"], folder)
        for _ in range(arguments.rounds):
            best["torch"].append(stamped(torch, folder))
            for name, command in cases.items():
                best[name].append(stamped(command, folder))
    figures: dict[str, object] = {}
    for place, unit in enumerate(("wall_s", "processor_s")):
        reference = min(times["exit"][place] for times in best["torch"])
        figures[f"torch_{unit}"] = reference
        for name in cases:
            parts = {part: min(times[part][place] for times in best[name]) for part in PARTS.values()}
            first = sum(list(parts.values())[:3])
            figures |= {f"{name}_{unit}": parts, f"{name}_first_step_{unit}": first}
            figures[f"{name}_over_torch_{unit}"] = first / reference
    report("startup", **figures)


def stamped(command: Sequence[str], folder: str) -> Times:
    """Wall and processor seconds of each part of a command run in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    times: Times = {}
    start, before = time.perf_counter(), (0.0, 0.0)
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        for line in process.stdout or ():
            for beginning, part in PARTS.items():
                if beginning and line.startswith(beginning):
                    now = time.perf_counter() - start, processor_seconds(watched)
                    times[part], before = (now[0] - before[0], now[1] - before[1]), now
        _, code, usage = os.wait4(process.pid, 0)  # what its own children spent is in there
        process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    times["exit"] = time.perf_counter() - start - before[0], usage.ru_utime + usage.ru_stime - before[1]
    return times


def processor_seconds(process: psutil.Process) -> float:
    """Processor seconds so far of a process and those that it has started."""
    return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])


if __name__ == "__main__":
    main()
