"""Batches a second of every back end, against PyTorch's DataLoader with Pillow and against FFCV's plain reading.

    python -m benchmarks.loaders [--sides 32 64] [--rounds 3] [--steps 48] [--seconds 2] [--save]

A step is what training takes: 64 labeled images (weak view) and 64 unlabeled ones (one weak, two strong views), 256
samples in all, normalized float32 on the CPU. `dataloader` makes the same views with Pillow, in as many workers as
there are cores; `ffcv_read` is FFCV's own loader copying stored images out of the file, with no views made of them, and
its samples are those images; `ffcv:jpeg90` decodes JPEGs. `ratio_dataloader` compares with `dataloader` at the same
side. The cases take turns; each is opened anew, runs until its queues are as they stay, and is timed over so many steps
and so many seconds at least: the fast ones take milliseconds a step, too short to see what else the machine does. The
median of the rounds is reported.
Images are tiles of the two photographs that come with scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.augment import photographs
from benchmarks.common import report
from benchmarks.pillow_loader import pillow_batches
from data_prep.folder.manifest import Manifest, Origin, file_entry, write_manifest
from data_prep.folder.writers import write_array
from pipelines import Stream, open_loaders

LABELED, UNLABELED_VIEWS, IMAGES, CLASSES = 64, ("weak", "strong", "strong"), 2048, 10
STREAMS = {"labeled": Stream("labeled", ("weak",)), "unlabeled": Stream("unlabeled", UNLABELED_VIEWS)}
SAMPLES = LABELED * (1 + len(UNLABELED_VIEWS))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64], help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median is reported")
    parser.add_argument("--steps", type=int, default=48, help="steps untimed in each case, then timed at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds of each case in a round, at least")
    parser.add_argument("--images", type=int, default=IMAGES, help="images in the data set")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    size = (options.images, options.rounds, options.steps, options.seconds)
    cases = [case for side in options.sides for case in measure(side, *size)]
    settings = {"labeled": LABELED, "views": UNLABELED_VIEWS}
    settings |= {name: getattr(options, name) for name in ("steps", "seconds", "rounds")}
    report("loaders", {"cases": cases, **settings, "cores": CORES}, save=options.save)


def measure(side: int, images: int, rounds: int, steps: int, least: float) -> list[dict[str, Any]]:
    """Samples a second of every case at one size of image."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        write_photographs(folder, side, images)
        makers: dict[str, tuple[Callable[[], Iterator[Any]], int]] = {
            backend: (lambda backend=backend: our_batches(folder, backend), SAMPLES)  # type: ignore[misc]
            for backend in ("resident", "ffcv", "dali")
            if backend == "resident" or find_spec({"dali": "nvidia.dali"}.get(backend, backend))
        }
        if "ffcv" in makers:
            jpeg = Path(name) / "jpeg"
            write_photographs(jpeg, side, images, kept_as="jpeg90")
            makers["ffcv:jpeg90"] = (lambda: our_batches(jpeg, "ffcv"), SAMPLES)
        makers["dataloader"] = (lambda: pillow_batches(folder, LABELED, CORES), SAMPLES)
        if "ffcv" in makers:
            makers["ffcv_read"] = (lambda: ffcv_images(folder / "train.beton"), 2 * LABELED)
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(rounds):
            for name, (make, _) in makers.items():
                seconds[name].append(seconds_per_step(make, steps, least))
    rates = {name: samples / statistics.median(seconds[name]) for name, (_, samples) in makers.items()}
    return [
        {
            "backend": name,
            "res": side,
            "samples_per_s": round(rate),
            "ratio_dataloader": round(rate / rates["dataloader"], 2),
        }
        for name, rate in rates.items()
    ]


def seconds_per_step(make: Callable[[], Iterator[Any]], steps: int, least: float) -> float:
    """Open, take `steps` batches untimed, time as many and for `least` seconds at least, close."""
    batches = make()
    with closing(batches):  # type: ignore[type-var]
        for _ in islice(batches, steps):
            pass
        start = time.perf_counter()
        for taken, _ in enumerate(batches, 1):
            seconds = time.perf_counter() - start
            if taken >= steps and seconds >= least:
                return seconds / taken
    raise RuntimeError(f"a loader ended within {steps} steps and {least:g} seconds")


def our_batches(folder: Path, backend: str) -> Iterator[Any]:
    """A back end's batches; it may use all cores."""
    loaders = open_loaders(
        folder,
        STREAMS,
        batch=LABELED,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        backend=backend,
        threads=CORES,
    )
    try:
        yield from loaders.train()
    finally:
        loaders.close()


def ffcv_images(path: Path) -> Iterator[Any]:
    """FFCV's own loader, epoch after epoch, copying stored images."""
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    with thread_counts_kept():
        loader = Loader(
            str(path),
            2 * LABELED,
            num_workers=CORES,
            os_cache=True,
            order=OrderOption.RANDOM,
            seed=0,
            drop_last=True,
            pipelines={"image": [SimpleRGBImageDecoder()], "label": None},
        )
        while True:
            epoch = iter(loader)
            with closing(epoch):
                yield from epoch


@contextmanager
def thread_counts_kept() -> Iterator[None]:
    """FFCV's loader sets torch's thread count for the whole process."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_photographs(folder: Path, side: int, count: int, kept_as: Literal["raw", "jpeg90"] = "raw") -> None:
    """A data folder of tiles of photographs in every form that the installed back ends read; with JPEGs in FFCV's."""
    folder.mkdir()
    images = photographs(side, count)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    arrays = {
        "train": images,
        "test": images[:CLASSES],
        "train_labels": labels,
        "test_labels": labels[:CLASSES],
        "labeled_rows": np.arange(count // 8, dtype=np.int64),
        "unlabeled_rows": np.arange(count, dtype=np.int64),
    }
    for name, array in arrays.items():
        write_array(folder / f"{name}.npy", array)
    if find_spec("ffcv"):
        from data_prep.folder.beton import write_betons

        write_betons(folder, ("train", "test"), kept_as=kept_as)
    if kept_as == "raw" and find_spec("nvidia.dali"):
        from data_prep.folder.dali import write_dali

        write_dali(folder, "train")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    counts = {part: np.bincount(values, minlength=CLASSES).tolist() for part, values in (
        ("labeled", labels[: count // 8]), ("unlabeled", labels), ("test", labels[:CLASSES])
    )}  # fmt: skip
    write_manifest(
        folder,
        Manifest(
            name="photographs",
            resolution=side,
            class_names=[f"class {k}" for k in range(CLASSES)],
            labeled_counts=counts["labeled"],
            unlabeled_counts=counts["unlabeled"],
            test_counts=counts["test"],
            mean=(images.mean((0, 1, 2)) / 255).tolist(),
            std=(images.std((0, 1, 2)) / 255).tolist(),
            split={},
            source="tiles of the photographs of scikit-learn",
            command="python -m benchmarks.loaders",
            origin=Origin(beton=kept_as),
            files={path.relative_to(folder).as_posix(): file_entry(path) for path in files},
        ),
    )


if __name__ == "__main__":
    main()
