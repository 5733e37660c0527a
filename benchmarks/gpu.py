"""Prove and measure a GPU within eight minutes: `make gpu`, or python -m benchmarks.gpu

    python -m benchmarks.gpu [--data FOLDER] [--only PART ...]

Eight parts, each in a process of its own with a limit of time, so that no failure of one (or of the driver under it)
ends another: what it had found until then is kept, beside the reason why it ended. A line says which part begins. The
result is benchmarks/results/gpu-<card>.json, written anew after every part, and a table. Without a card one line says
so, and the exit code is 2. It needs no installation: PYTHONPATH with the packages of a run (omegaconf among them) is
enough; what pytest, FFCV, DALI or compute-sanitizer would be needed for is skipped where they are not there, and says
so.

`--data` is a data folder to train on; by default one of random pixels of CIFAR-10-LT's size. `--device cpu --small`
goes the same ways in a minute or two on a CPU: no figure of that means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_parts
from benchmarks.common import RESULTS, ROOT, hardware
from data_prep.files import replacing
from semi_fast.run.summary import code_commit

WHOLE = 480  # seconds
MARK = "@figures "  # begins the lines of a part that are read
# Others, on the same work: images a second through WRN-28-2 in training.
PUBLIC = "FixMatch 46,600 images/s on an A100, 17,500 on 4 V100; DASO 3,700 on a Titan Xp; USB 1,300 to 2,200"


class Part(NamedTuple):
    """A part of the whole."""

    run: Callable[[gpu_parts.Lab], None]
    seconds: int  # at most
    what: str


PARTS = {
    "kernels": Part(gpu_parts.kernels, 45, "driver, card, versions; compile, launch and check each kernel"),
    "tests": Part(gpu_parts.marked_tests, 75, "the tests that need a card"),
    "sanitizer": Part(gpu_parts.sanitizer, 40, "memcheck and racecheck of the kernels"),
    "speed": Part(gpu_parts.speed, 120, "steps eager, compiled, as one graph; views, bank, loaders; bytes a second"),
    "training": Part(gpu_parts.training, 95, "2,000 steps of two methods; graph against eager and compiled; memory"),
    "large": Part(gpu_parts.large, 50, "evaluation of 50,000 images and 50 steps, ResNet-50 at 64 px"),
    "dali": Part(gpu_parts.dali, 25, "DALI on the GPU"),
    "two": Part(gpu_parts.two, 30, "two GPUs"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts, or one of them in this process; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data folder to train on")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this command itself")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try this command itself")
    parser.add_argument("--part", choices=[*PARTS, "launches"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: benchmarks.gpu needs a CUDA device, and PyTorch finds none.", file=sys.stderr)
        return 2
    if options.part:
        scale = gpu_parts.SMALL if options.small else gpu_parts.REAL
        lab = gpu_parts.Lab(torch.device(options.device), scale, options.folder, options.data, say)
        (gpu_parts.launches if options.part == "launches" else PARTS[options.part].run)(lab)
        return 0
    measure(options)
    return 0


def say(name: str, figures: Any) -> None:
    """Hand figures to the process that reads them, at once."""
    print(MARK + json.dumps({name: figures}), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts asked for, one after the other; writes the result after each and prints the table."""
    began = time.monotonic()
    card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-")
    result: dict[str, Any] = {"benchmark": name, "parts": {}, "commit": code_commit(), "hardware": hardware()}
    options.out.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(PARTS, 1):
        if part not in options.only:
            continue
        limit = min(PARTS[part].seconds, WHOLE - (time.monotonic() - began))
        print(f"{number}/{len(PARTS)} {part}, up to {max(0, limit):.0f} s: {PARTS[part].what}", flush=True)
        found = run_part(part, limit, options) if limit > 1 else {"failed": "no time was left"}
        result["parts"][part] = found
        problem = found.get("failed") or found.get("skipped")
        print(
            f"    {'failed: ' if 'failed' in found else ''}{problem or 'done'} ({found.get('seconds', 0)} s)",
            flush=True,
        )
        with replacing(options.out / f"{name}.json") as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    print(f"\n{table(result)}\n\n{options.out / f'{name}.json'}")
    return result


def run_part(part: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """A part's figures by name, `seconds`, and `failed` with the reason where it did not come to its end."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--folder", folder]
        command += ["--device", options.device, *(["--small"] if options.small else [])]
        command += ["--data", str(options.data.resolve())] if options.data else []
        problem, lines = limited(command, limit, Path(folder))
    found: dict[str, Any] = {}
    for line in lines:
        if line.startswith(MARK):
            found |= json.loads(line.removeprefix(MARK))
    if problem:
        found["failed"] = problem
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def limited(command: list[str], limit: float, folder: Path) -> tuple[str | None, list[str]]:
    """Run a command for so many seconds at most, all that it starts included.

    Returns: what went wrong, in one line, or None; and the lines it printed.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if "cpu" in command:
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it, or what it left behind
            process.wait()
        lines, errors = ((folder / name).read_text(errors="replace").splitlines() for name in ("out", "err"))
    if code is None:
        return f"stopped after {limit:.0f} s", lines
    if code:
        last = next((line.strip() for line in reversed(errors) if line.strip()), "no word of it")
        return f"exit code {code}: {last[:300]}", lines
    return None, lines


def table(result: dict[str, Any]) -> str:
    """What matters of a result, as Markdown for the README."""
    parts, rows = result["parts"], []
    speed, training = parts.get("speed", {}), parts.get("training", {})
    for name, case in {**speed.get("steps", {}), **training.get("runs", {})}.items():
        if "images_per_s" in case:
            share = f", {100 * case['ceiling_share']:.0f}% of the bare model" if case.get("ceiling_share") else ""
            rows.append((name, f"{case['images_per_s']:,.0f} images/s, {case['step_ms']:.2f} ms a step{share}"))
    for name, case in speed.get("kernels", {}).items():
        if "device_us" not in case:
            continue
        share = f", {100 * case['bandwidth_share']:.0f}% of the memory's rate" if case.get("bandwidth_share") else ""
        rows.append((name, f"{case['device_us']:,.1f} µs{share}"))
    for name, case in {**speed.get("loaders", {}), **parts.get("dali", {}).get("loaders", {})}.items():
        if "images_per_s" in case:
            rows.append((f"loader {name}", f"{case['images_per_s']:,.0f} images/s"))
    if "fused_ms" in speed.get("paper", {}):
        paper = speed["paper"]
        rows.append(("least time of a step on paper", f"{paper['fused_ms']} ms fused, {paper['separate_ms']} ms not"))
    for name, case in training.get("runs", {}).items():
        if case.get("device_mb", [None])[0]:
            rows.append(
                (f"{name}: memory", "{:,.0f} MiB after a quarter, {:,.0f} at the end".format(*case["device_mb"]))
            )
    for name, case in training.get("equality", {}).items():
        if "loss" in case:
            rows.append((name, f"mean loss {case['loss']:.2g} off, weights {case['weights']:.2g}"))
    if "seconds" in (case := parts.get("large", {}).get("evaluation", {})):
        rows.append((f"evaluation of {case['images']:,} images", f"{case['seconds']:.2f} s"))
    if "marked" in parts.get("tests", {}):
        marked = parts["tests"]["marked"]
        rows.append(("tests on the card", ", ".join(f"{count} {word}" for word, count in marked.items() if count)))
    rows += [
        (f"{name}: {kind}", part[kind])
        for name, part in parts.items()
        for kind in ("failed", "skipped")
        if kind in part
    ]
    lines = ["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]
    machine = result["hardware"]
    where = machine["gpu"] or machine["cpu"]
    lines += ["", f"Measured on {where}; torch {machine['torch']}; commit {result['commit']}. Others: {PUBLIC}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
