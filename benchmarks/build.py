"""Images per second of a build against a bare Pillow loop: python -m benchmarks.build

The same JPEGs, real ILSVRC photographs where a zip of them is given, hard-linked a few thousand times into class
folders. A bare loop does nothing but open, convert to RGB and resize by Pillow's box filter. The ratio `loops` is the
build's rate over that of as many bare loops at the same time as it has workers; `loop` over that of one loop alone,
times the workers: two cores that share units do not do twice what one does alone. Timed is the whole stage from listing
to the last row, with the start of the worker processes; starting the loops' processes is not. The ratio `processor`
compares processor seconds an image, start, imports and listing included, with those of `loops`: one loop alone takes
fewer. `peak_rss_mb` is the main process and all its workers together, each at its most.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import forkserver, get_context
from pathlib import Path

import numpy as np

from data_prep.cores import usable_cores
from data_prep.sources.class_folders import labeled_images, list_images
from data_prep.sources.resize import Preparation
from data_prep.work.filling import fill, start_server, target
from data_prep.work.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT.parent / "shared" / "data" / "ilsvrc_raw_sample.zip"
RESOLUTION = 64


def make_folder(root: Path, count: int, photos: Path) -> str:
    """`count` JPEGs in class folders under `root`; returns what they are."""
    from PIL import Image

    if photos.is_file():
        with zipfile.ZipFile(photos) as archive:
            files = [archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".JPEG")]
        kind = f"{len(files)} real photographs, repeated"
    else:  # of the size and smoothness of photographs
        files, kind = [], "64 made-up images of 500x375, repeated"
        for seed in range(64):
            noise = np.random.default_rng(seed).integers(0, 256, (38, 50, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
    originals = root / "originals"
    originals.mkdir()
    for number, data in enumerate(files):
        (originals / f"{number}.JPEG").write_bytes(data)
    for number in range(count):
        folder = root / "train" / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(originals / f"{number % len(files)}.JPEG", folder / f"{number:06d}.JPEG")
    return kind


def bare_loop(folder: Path, start: int, step: int) -> tuple[float, float]:
    """Seconds, and processor seconds, of Pillow alone for an image, over every `step`-th one from `start`."""
    from PIL import Image

    paths = sorted(folder.glob("*/*.JPEG"), key=lambda path: path.name)[start::step]
    begin, cpu = time.perf_counter(), time.process_time()
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX))
    return (time.perf_counter() - begin) / len(paths), (time.process_time() - cpu) / len(paths)


def build_stage(folder: Path, work: Path, workers: int) -> dict[str, float]:
    """List, decode, resize and write all images of a folder; seconds and memory, measured in this process."""
    start = time.perf_counter()
    start_server()
    listing = list_images(folder)
    images, _ = labeled_images(listing, listing.inner, None, str(folder))
    rows = np.arange(len(images), dtype=np.int64)
    goal = target(work, "train", images, rows, Preparation(RESOLUTION))
    with Journal(work / "journal") as journal:
        bad = [item for _, found in fill(goal, journal, workers) for item in found]
    seconds = time.perf_counter() - start
    if bad:
        raise SystemExit(f"unreadable: {bad[0]}")
    forkserver._forkserver._stop()  # which makes its use of the processor, and its workers', this process's children's
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": seconds / len(images),
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in (own, children)) / len(images),
        "rss_mb": (own.ru_maxrss + workers * children.ru_maxrss) / 1024,
    }


def in_fresh_process(folder: Path, workers: int) -> dict[str, float]:
    """`build_stage` in a process of its own, so that its memory is that of a build and of nothing else."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = [sys.executable, "-m", "benchmarks.build", "--stage", str(folder), work, "--workers", str(workers)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    if "--stage" in sys.argv:  # a fresh process, without torch
        folder, work, _, workers = sys.argv[2:]
        print(json.dumps(build_stage(Path(folder), Path(work), int(workers))))
        return
    from benchmarks.common import fastest, in_turns, options, report

    parser = options(__doc__, rounds=9, seconds=60)
    parser.add_argument("--images", type=int, default=4000, help="JPEGs to build (default 4000)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one a core)")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="zip of real .JPEG files")
    arguments = parser.parse_args()
    workers, cpu, memory = arguments.workers, {"build": math.inf, "loops": math.inf}, 0.0

    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        kind = make_folder(Path(name), arguments.images, arguments.photos)
        folder = Path(name) / "train"

        def loops(count: int) -> float:
            """Seconds an image of so many bare loops at the same time, each through its share of the images."""
            found = list(pool.map(bare_loop, [folder] * count, range(count), [workers] * count))
            if count == workers:
                cpu["loops"] = min(cpu["loops"], sum(used for _, used in found) / count)
            return 1 / sum(1 / seconds for seconds, _ in found)

        def build() -> float:
            nonlocal memory
            figures = in_fresh_process(folder, workers)
            cpu["build"], memory = min(cpu["build"], figures["cpu"]), max(memory, figures["rss_mb"])
            return figures["seconds"]

        cases = {"build": build, "loops": partial(loops, workers), "loop": partial(loops, 1)}
        times = in_turns(cases, arguments.rounds, arguments.seconds, warmup=0)  # each turn starts anew, or is long
    took = {name: fastest(values) for name, values in times.items()}
    ratios = {
        "loops": took["loops"] / took["build"],
        "loop": took["loop"] / took["build"] / workers,
        "processor": cpu["loops"] / cpu["build"],
    }
    facts = {"workers": workers, "images": arguments.images, "source": kind, "resolution": RESOLUTION}
    report("build", ratios, times, "image", peak_rss_mb=round(memory), **facts)


if __name__ == "__main__":
    main()
