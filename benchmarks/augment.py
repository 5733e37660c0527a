"""Weak and two strong views of 32 px images: the fused kernel against the same policy in Pillow.

    python -m benchmarks.augment [--side 32] [--rounds 100] [--policy strong_photo]
    python -m benchmarks.augment --cuda-report

Ours is timed as training uses it: drawing the plan, then one call that gathers, augments, normalizes and writes
channels_last float32; with `--policy` this view alone is timed. The Pillow reference gets its random numbers for
nothing, pads by indexing (several times faster than np.pad) and stops at one normalized NumPy array a view. `ratio`
compares one thread with one thread, the fastest round of each, which other work on the machine disturbs least. Beside
it are all threads, the compiled kernel alone (`bare`), the drawing of plans, and the quartiles of all rounds. Images
are tiles of the two photographs that come with scikit-learn. On a machine with a CUDA device its kernel is timed as
well, plan and copies to the device included.

`--cuda-report` needs no GPU: it compiles the CUDA kernel, assembles it, and reports registers, shared memory, spills,
how many blocks fit on a multiprocessor and why no more, and the bytes of device memory that a view reads and writes
against the least possible (each pixel read once as uint8 and written once as bfloat16). Up to 86 px nothing else goes
through device memory, of which the kinds of store instructions in the code are the proof.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import pillow_views
from benchmarks.common import report
from data_prep.errors import UserError
from pipelines.augment import kernel_cpu
from pipelines.augment.op import augment
from pipelines.augment.plan import OPS, Planner
from pipelines.augment.randaugment import COLUMNS
from pipelines.augment.views import VIEWS
from pipelines.cuda.report import THREADS, assemble

VIEWS_OF_EACH = ("weak", "strong", "strong")
TURN = 0.002
PILLOW_IMAGES = 4
IMAGES = 64  # the unlabeled batch of a step, all views of which one call makes
# Memory bandwidth in bytes a second, from the data sheets.
BANDWIDTH = {(8, 0): {"A100 80GB SXM": 2.039e12}, (9, 0): {"H100 SXM": 3.35e12}}
MEAN = np.array([0.4914, 0.4822, 0.4465])
STD = np.array([0.2471, 0.2435, 0.2616])


def photographs(side: int, count: int) -> np.ndarray:
    """Tiles of real photographs, each four times the side and scaled down: (count, side, side, 3) uint8."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    tiles = []
    for i in range(count):
        photo = photos[i % len(photos)]
        size = min(4 * side, photo.height)
        x, y = int(rng.integers(photo.width - size + 1)), int(rng.integers(photo.height - size + 1))
        tiles.append(np.asarray(photo.crop((x, y, x + size, y + size)).resize((side, side))))
    return np.stack(tiles)


def kernel_case(
    images: np.ndarray | torch.Tensor, names: tuple[str, ...], dtype: torch.dtype, threads: int
) -> Callable[[], object]:
    """Draw plans and make the views of all images."""
    views = [VIEWS[name] for name in names]
    planner = Planner(views, images.shape[1], images.shape[2])
    stored, rows = torch.as_tensor(images), torch.arange(len(images)).repeat(len(names))
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.from_numpy(MEAN), torch.from_numpy(STD)

    def run() -> object:
        plan = planner.sample_all(views, len(images), generator)
        return augment(stored, rows, torch.from_numpy(plan), planner.table, mean, std, dtype, threads)

    return run


def bare_case(images: np.ndarray, name: str, dtype: torch.dtype) -> Callable[[], object]:
    """The compiled kernel alone: the plan is drawn and checked, and the memory written to is there already."""
    (count, height, width, _), full = images.shape, dtype == torch.float32
    planner = Planner([VIEWS[name]], height, width)
    shape = (count, height, 3 * width)
    out = torch.zeros(shape, dtype=torch.float32 if full else torch.uint16).numpy()
    arguments = (
        images.reshape(shape),
        np.arange(count),
        planner.sample(VIEWS[name], count, torch.Generator().manual_seed(0)),
        planner.table.numpy(),
        (255.0 * MEAN).astype(np.float32),
        (1.0 / (255.0 * STD)).astype(np.float32),
        out if full else np.empty((0, *shape[1:]), np.float32),
        np.empty((0, *shape[1:]), np.uint16) if full else out,
    )
    return lambda: kernel_cpu.run(*arguments, 0, count)


def plan_case(images: np.ndarray, names: tuple[str, ...]) -> Callable[[], object]:
    """Drawing the plan alone."""
    views = [VIEWS[name] for name in names]
    planner, generator = Planner(views, images.shape[1], images.shape[2]), torch.Generator().manual_seed(0)
    return lambda: planner.sample_all(views, len(images), generator)


def pillow_case(images: np.ndarray, names: tuple[str, ...]) -> list[Callable[[], object]]:
    """The same views one by one, in parts of `PILLOW_IMAGES` images."""
    pictures = [Image.fromarray(image) for image in images]
    draws = np.random.default_rng(0).random((len(names), len(images), 37)).tolist()
    mean, std = MEAN.astype(np.float32), STD.astype(np.float32)

    def make(part: slice) -> object:
        return [
            pillow_views.finish(pillow_views.VIEWS[name](picture, numbers), mean, std)
            for name, each in zip(names, draws, strict=True)
            for picture, numbers in zip(pictures[part], each[part], strict=True)
        ]

    return [partial(make, slice(i, i + PILLOW_IMAGES)) for i in range(0, len(images), PILLOW_IMAGES)]


def seconds_per_view(cases: dict[str, tuple[list[Callable[[], object]], int]], rounds: int) -> dict[str, np.ndarray]:
    """The seconds that each part of a case takes in each round, over the views of all parts: (rounds, parts).

    The cases take turns in an order drawn anew for each round, so that what slows the machine down for a while meets
    all of them. Each turn of a part is a call that is not timed, which leaves caches and memory as the next one finds
    them, then calls until `TURN` seconds have passed. Cases of long calls come in parts because a long turn is never
    left alone where others use the machine.
    """
    order = random.Random(0)
    times: dict[str, list[list[float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name in order.sample(list(cases), len(cases)):
            runs, views = cases[name]
            times[name].append([_turn(run) / views for run in runs])
    return {name: np.array(values) for name, values in times.items()}


def _turn(run: Callable[[], object]) -> float:
    run()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < TURN:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def fastest(times: np.ndarray) -> float:
    """Of (rounds, parts): each part's fastest round, added up."""
    return float(times.min(0).sum())


def spread(times: np.ndarray) -> dict[str, float]:
    """Of (rounds, parts) in seconds: the fastest, and the quartiles of the rounds, in microseconds."""
    quarters = np.quantile(times.sum(1), (0.25, 0.5, 0.75))
    named = zip(("min", "q1", "median", "q3"), (fastest(times), *quarters), strict=True)
    return {name: round(1e6 * float(value), 2) for name, value in named}


def cuda_case(images: np.ndarray, names: tuple[str, ...], dtype: torch.dtype) -> Callable[[], object]:
    """The same on the CUDA device, waited for."""
    make = kernel_case(torch.from_numpy(images).cuda(), names, dtype, 1)

    def run() -> object:
        views = make()
        torch.cuda.synchronize()
        return views

    return run


def cuda_report() -> list[dict[str, object]]:
    """What the assembler says of the CUDA kernel, by size and compute capability, for bfloat16 and the strong view."""
    from pipelines.augment import kernel_cuda  # imports numba.cuda

    columns, ops, cases = OPS + VIEWS["strong"].n, VIEWS["strong"].n, []
    for side, shared in ((32, True), (64, True), (128, False)):
        for cc in ((8, 0), (9, 0)):
            bounds = kernel_cuda.launch_bounds(shared)
            kernel = kernel_cuda.build(side, side, False, shared)
            code = assemble(kernel, kernel_cuda.signature(False), cc, bounds)
            blocks = code.blocks_per_multiprocessor(kernel_cuda.THREADS)
            limit = min(blocks, key=lambda reason: blocks[reason])
            pixels = 3 * side * side
            read, written = pixels + 8 + 4 * columns + 8 * COLUMNS * ops + 24, 2 * pixels
            cases.append(
                {
                    "side": side,
                    "cc": f"{cc[0]}.{cc[1]}",
                    "registers": code.registers,
                    "shared_bytes": code.shared_bytes,
                    "spill_bytes": code.spill_stores + code.spill_loads,
                    "blocks_per_multiprocessor": blocks,
                    "limited_by": limit,
                    "occupancy": blocks[limit] * kernel_cuda.THREADS / THREADS,
                    "bytes_read": read,
                    "bytes_written": written,
                    "bytes_least": 3 * pixels,
                    "bytes_ratio": round((read + written) / (3 * pixels), 3),
                    "stores": dict(Counter(re.findall(r"\bst\.[\w.]+", code.ptx))),
                    "workspace_bytes_per_block": 0 if shared else 2 * pixels,
                    "views_per_s_by_bandwidth": {
                        name: round(bandwidth / (read + written)) for name, bandwidth in BANDWIDTH[cc].items()
                    },
                }
            )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="height and width in pixels (default 32)")
    parser.add_argument("--rounds", type=int, default=100, help="rounds, 2 or more, of a turn each (default 100)")
    parser.add_argument("--policy", choices=pillow_views.VIEWS, help="a view to time alone (default: weak and strong)")
    parser.add_argument("--cuda-report", action="store_true", help="what the CUDA kernel costs, without a GPU")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is 2 or more, got {options.rounds}")
    if options.cuda_report:
        try:
            report("augment_cuda", {"cases": cuda_report()})
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        return
    images = photographs(options.side, IMAGES)
    every, threads = (options.policy,) if options.policy else VIEWS_OF_EACH, torch.get_num_threads()
    all_views = IMAGES * len(every)
    cases = {
        "kernel": ([kernel_case(images, every, torch.float32, 1)], all_views),
        "pillow": (pillow_case(images, every), all_views),
        "kernel_all_threads": ([kernel_case(images, every, torch.float32, threads)], all_views),
        "kernel_bfloat16": ([kernel_case(images, every, torch.bfloat16, 1)], all_views),
    }
    for name in dict.fromkeys(every if len(every) > 1 else ()):
        cases[f"kernel_{name}"] = ([kernel_case(images, (name,), torch.float32, 1)], IMAGES)
        cases[f"pillow_{name}"] = (pillow_case(images, (name,)), IMAGES)
    for name in dict.fromkeys(("plain", *every)):
        cases[f"bare_{name}"] = ([bare_case(images, name, torch.float32)], IMAGES)
        cases[f"bare_{name}_bfloat16"] = ([bare_case(images, name, torch.bfloat16)], IMAGES)
    cases["plan"] = ([plan_case(images, every)], all_views)
    if torch.cuda.is_available():
        cases["cuda"] = ([cuda_case(images, every, torch.float32)], all_views)
        cases["cuda_bfloat16"] = ([cuda_case(images, every, torch.bfloat16)], all_views)
    times = seconds_per_view(cases, options.rounds)
    took = {name: fastest(values) for name, values in times.items()}
    report(
        "augment",
        {
            "side": options.side,
            "views": every,
            "ratio": round(took["pillow"] / took["kernel"], 1),
            "views_per_s_per_core": round(1 / took["kernel"]),
            "pillow_views_per_s_per_core": round(1 / took["pillow"]),
            "views_per_s_all_threads": round(1 / took["kernel_all_threads"]),
            "threads": threads,
            "us_per_view": {name: spread(values) for name, values in times.items()},
        },
    )


if __name__ == "__main__":
    main()
