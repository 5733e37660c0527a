"""Weak and two strong views of 32 px images: the fused kernel against the same policy in Pillow.

    python -m benchmarks.augment [--side 32] [--policy strong_photo]
    python -m benchmarks.augment --cuda-report

Ours is timed as training uses it: drawing the plan, then one call that gathers, augments, normalizes and writes
channels_last float32; with `--policy` this view alone is timed. The Pillow reference gets its random numbers for
nothing, pads by indexing (several times faster than np.pad) and stops at one normalized NumPy array a view; its turns
come in parts, because a long turn is never left alone where others use the machine. The ratios compare one thread with
one thread. Beside them are all threads, the compiled code alone, and the drawing of plans. Images are tiles of the two
photographs that come with scikit-learn. On a machine with a CUDA device its kernel is timed as well, plan and copies to
the device included.

`--cuda-report` needs no GPU: it compiles the CUDA kernel, assembles it, and reports registers, shared memory, spills,
how many blocks fit on a multiprocessor and why no more, and the bytes of device memory that a view reads and writes
against the least possible (each pixel read once as uint8 and written once as bfloat16). Up to 86 px nothing else goes
through device memory, of which the kinds of store instructions in the code are the proof.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import pillow_views
from benchmarks.common import ONE_THREAD, fastest, in_turns, options, report, timed
from data_prep.errors import UserError
from pipelines.augment import kernel_cpu
from pipelines.augment.op import augment
from pipelines.augment.plan import OPS, Planner
from pipelines.augment.randaugment import COLUMNS
from pipelines.augment.views import VIEWS
from pipelines.cuda.report import THREADS, assemble

VIEWS_OF_EACH = ("weak", "strong", "strong")
TURN = 0.002
ALL_THREADS = "kernel, all threads"
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
        images.reshape(-1),
        np.arange(count) * images[0].size,
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
    parser = options(__doc__, rounds=100, seconds=60)
    parser.add_argument("--side", type=int, default=32, help="height and width in pixels (default 32)")
    parser.add_argument("--policy", choices=pillow_views.VIEWS, help="a view to time alone (default: weak and strong)")
    parser.add_argument("--cuda-report", action="store_true", help="what the CUDA kernel costs, without a GPU")
    arguments = parser.parse_args()
    if arguments.cuda_report:
        try:
            report("augment_cuda", kernels=cuda_report())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        return
    images, threads = photographs(arguments.side, IMAGES), torch.get_num_threads()
    every = (arguments.policy,) if arguments.policy else VIEWS_OF_EACH
    apart = tuple(dict.fromkeys(every)) if len(every) > 1 else ()
    made: dict[str, tuple[Sequence[Callable[[], object]], int]] = {
        "kernel": ([kernel_case(images, every, torch.float32, 1)], len(every)),
        "Pillow": (pillow_case(images, every), len(every)),
        ALL_THREADS: ([kernel_case(images, every, torch.float32, threads)], len(every)),
        "kernel, bf16": ([kernel_case(images, every, torch.bfloat16, 1)], len(every)),
        "plan alone": ([plan_case(images, every)], len(every)),
    }
    for name in apart:
        made[f"kernel, {name}"] = ([kernel_case(images, (name,), torch.float32, 1)], 1)
        made[f"Pillow, {name}"] = (pillow_case(images, (name,)), 1)
    for name in dict.fromkeys(("plain", *every)):
        for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bf16")):
            made[f"compiled code, {name}{suffix}"] = ([bare_case(images, name, dtype)], 1)
    if torch.cuda.is_available():
        on_device = torch.from_numpy(images).cuda()
        for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bf16")):
            made[f"CUDA{suffix}"] = ([kernel_case(on_device, every, dtype, 1)], len(every))
    cases = {}
    for name, (runs, views) in made.items():
        clock = time.perf_counter if name == ALL_THREADS else ONE_THREAD
        cases[name] = [timed(run, least=TURN, of=IMAGES * views, clock=clock) for run in runs]
    times = in_turns(cases, arguments.rounds, arguments.seconds)
    took = {name: fastest(values) for name, values in times.items()}
    ratios = {"views": took["Pillow"] / took["kernel"]}
    ratios |= {name: took[f"Pillow, {name}"] / took[f"kernel, {name}"] for name in apart}
    report("augment", ratios, times, "view", side=arguments.side, views=every)


if __name__ == "__main__":
    main()
