"""How the time of the fused augmentation grows: with views and pixels, but not with the size of the data set.

    python -m benchmarks.growth [--most 1000000]

Strong views in float32 on one thread, drawing the plan included: of 448 random rows of a memory-mapped array of 10^3,
10^4, ... up to `--most` images of 32 px (real photographs over and over; 10^6 take 3 GB of temporary disk); of 64 to
1,024 rows; of images of 16 to 128 px. `exponents` are slopes of a line through the logarithms: 1 is linear, 0 is
independent. Every page of the arrays has been touched before, as after an epoch; images that exceed the processor's
caches cost a read from memory each, whatever their number.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.augment import MEAN, STD, TURN, photographs
from benchmarks.common import ONE_THREAD, fastest, in_turns, options, report, timed
from data_prep.errors import UserError
from pipelines.augment.op import augment
from pipelines.augment.plan import Planner
from pipelines.augment.views import VIEWS

VIEWS_A_STEP = 448
SIDE = 32
VIEW_COUNTS = (64, 128, 256, 512, 1024)
SIDES = (16, 32, 64, 128)


def repeated_images(path: Path, count: int) -> np.ndarray:
    """A memory-mapped array on disk of real images, repeated: (count, SIDE, SIDE, 3) uint8."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, SIDE, SIDE, 3))
    images = photographs(SIDE, 1000)
    for start in range(0, count, len(images)):
        array[start : start + len(images)] = images[: count - start]
    array.flush()
    images = np.load(path, mmap_mode="r+")
    images[:, 0, 0, 0].max()  # maps every page
    return images


def strong_views(images: np.ndarray, count: int) -> Callable[[], object]:
    """Make strong views of `count` random rows, other ones at each call."""
    planner = Planner([VIEWS["strong"]], *images.shape[1:3])
    generator, stored = torch.Generator().manual_seed(0), torch.from_numpy(images)
    mean, std = torch.from_numpy(MEAN), torch.from_numpy(STD)

    def run() -> object:
        rows = torch.randint(len(stored), (count,), generator=generator)
        plan = torch.from_numpy(planner.sample(VIEWS["strong"], count, generator))
        return augment(stored, rows, plan, planner.table, mean, std, torch.float32, 1)

    return run


def slope(times: dict[int, float]) -> float:
    """Exponent of the power law that fits best: keys are sizes, values seconds."""
    return round(float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0]), 3)


def measure(most: int, rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """What a view takes by number of rows stored, by number of views, and by pixels of an image."""
    need = most * SIDE * SIDE * 3 * 10 // 9
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if need > free:
        raise UserError(
            f"{most} images need {need / 1e9:.1f} GB in {tempfile.gettempdir()}, {free / 1e9:.1f} are free."
        )
    with tempfile.TemporaryDirectory(prefix="growth") as folder:
        sizes = [10**power for power in range(3, 13) if 10**power <= most]
        stored = {size: repeated_images(Path(folder) / f"{size}.npy", size) for size in sizes}
        sources = [("rows", size, images, VIEWS_A_STEP) for size, images in stored.items()]
        sources += [("views", count, stored[sizes[0]], count) for count in VIEW_COUNTS]
        sources += [("pixels", side * side, photographs(side, 500), VIEWS_A_STEP) for side in SIDES]
        return in_turns(
            {
                f"{kind} {size}": timed(strong_views(images, count), least=TURN, of=count, clock=ONE_THREAD)
                for kind, size, images, count in sources
            },
            rounds,
            seconds,
        )


def main() -> None:
    parser = options(__doc__, rounds=30, seconds=120)
    parser.add_argument("--most", type=int, default=10**6, help="images of the largest array (default 1000000)")
    arguments = parser.parse_args()
    try:
        if arguments.most < 1000:
            raise UserError(f"--most is 1000 or more, got {arguments.most}")
        times = measure(arguments.most, arguments.rounds, arguments.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    took: dict[str, dict[int, float]] = {}
    for name, values in times.items():
        kind, size = name.split()
        took.setdefault(kind, {})[int(size)] = fastest(values)
    exponents = {kind: slope(each) for kind, each in took.items()}
    exponents["views"] += 1  # of a call: its time is that of a view times their number
    rows = took["rows"]
    report("growth", {"rows": rows[max(rows)] / rows[min(rows)]}, times, "view", exponents=exponents)


if __name__ == "__main__":
    main()
