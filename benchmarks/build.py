"""Images per second of a build against a bare Pillow loop: python -m benchmarks.build

The same JPEGs, real ILSVRC photographs where a zip of them is given, hard-linked a few thousand times into class
folders. `ratio` is the build's rate over (rate of the bare loop on one core) x workers; the loop does nothing but
open, convert to RGB and resize by Pillow's box filter. `together_ratio` is over as many bare loops at the same time:
two cores that share units do not do twice what one does alone. Timed is the whole stage from listing to the last row,
with the start of the worker processes; `fixed_s` is what a build adds once, whatever its size. `peak_rss_mb` is the
main process and all its workers together. `cpu_ratio` compares processor seconds per image instead of wall time: on a
machine that others use too, or whose cores share units, it is what the build itself adds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_prep.sources.class_folders import labeled_images, list_images
from data_prep.sources.resize import Preparation
from data_prep.work.filling import fill, target, usable_cores
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


def bare_loop(folder: Path, count: int) -> tuple[float, float]:
    """Images per second, and processor seconds per image, of Pillow alone, on one core."""
    from PIL import Image

    paths = sorted(folder.glob("*/*.JPEG"), key=lambda path: path.name)[:count]
    start, cpu = time.perf_counter(), time.process_time()
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX))
    return len(paths) / (time.perf_counter() - start), (time.process_time() - cpu) / len(paths)


def bare_together(folder: Path, count: int, workers: int) -> float:
    """Images per second of as many bare loops as workers, at the same time."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return sum(rate for rate, _ in pool.map(bare_loop, [folder] * workers, [count] * workers))


def build_stage(folder: Path, work: Path, workers: int) -> dict[str, float]:
    """List, decode, resize and write all images of a folder; seconds and memory, measured in this process."""
    start = time.perf_counter()
    listing = list_images(folder)
    images, _ = labeled_images(listing, listing.inner, None, str(folder))
    rows = np.arange(len(images), dtype=np.int64)
    goal = target(work, "train", images, rows, Preparation(RESOLUTION))
    with Journal(work / "journal") as journal:
        bad = [item for _, found in fill(goal, journal, workers) for item in found]
    seconds = time.perf_counter() - start
    if bad:
        raise SystemExit(f"unreadable: {bad[0]}")
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "images_per_s": len(images) / seconds,
        "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in (own, children)) / len(images),
        "main_rss_mb": own.ru_maxrss / 1024,
        "worker_rss_mb": children.ru_maxrss / 1024,
    }


def in_fresh_process(folder: Path, workers: int) -> dict[str, float]:
    """`build_stage` in a process of its own, so that its memory is that of a build and of nothing else."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = [sys.executable, "-m", "benchmarks.build", "--stage", str(folder), work, "--workers", str(workers)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def fixed_seconds(root: Path) -> float:
    """Seconds of a whole build of a few small images: start, checks, preview, checksums, manifest."""
    out = root / "digits"
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "data_prep" / "build.py"), "digits-lt", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="JPEGs to build (default 4000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; loop and build take turns (default 3)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one a core)")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="zip of real .JPEG files")
    parser.add_argument("--stage", nargs=2, type=Path, metavar=("FOLDER", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(build_stage(*options.stage, options.workers)))
        return
    from benchmarks.common import report

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        kind = make_folder(root, options.images, options.photos)
        bare, together, built = [], [], []
        for _ in range(options.rounds):
            bare.append(bare_loop(root / "train", options.images // 4))
            together.append(bare_together(root / "train", options.images // 4, options.workers))
            built.append(in_fresh_process(root / "train", options.workers))
        fixed = fixed_seconds(root)
    loop, loop_cpu = (statistics.median(column) for column in zip(*bare, strict=True))
    rate = statistics.median(one["images_per_s"] for one in built)
    memory = max(one["main_rss_mb"] + options.workers * one["worker_rss_mb"] for one in built)
    report(
        "build",
        {
            "ratio": round(rate / (loop * options.workers), 3),
            "together_ratio": round(rate / statistics.median(together), 3),
            "cpu_ratio": round(loop_cpu / statistics.median(one["cpu_s"] for one in built), 3),
            "images_per_s": round(rate, 1),
            "bare_images_per_s_per_core": round(loop, 1),
            "workers": options.workers,
            "peak_rss_mb": round(memory),
            "fixed_s": round(fixed, 1),
            "images": options.images,
            "source": kind,
            "resolution": RESOLUTION,
        },
    )


if __name__ == "__main__":
    main()
