"""Batches a second of every back end, against PyTorch's DataLoader with Pillow and against FFCV's plain reading.

    python -m benchmarks.loaders [--sides 32 64]

A step is what training takes: 64 labeled images (weak view) and 64 unlabeled ones (one weak, two strong views), 256
samples in all, normalized float32 on the CPU. `DataLoader` makes the same views with Pillow, in as many workers as
there are cores; `reading` is FFCV's own loader copying stored images out of the file, with no views made of them, and
its samples are those images; `jpeg90` is FFCV's file of JPEGs. The ratios are to `DataLoader` at the same side. In each
turn a case is opened anew, runs until its queues are as they stay, and is timed over so many steps and so many seconds
at least: the fast ones take milliseconds a step, too short to see what else the machine does.
Images are tiles of the two photographs that come with scikit-learn.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.augment import photographs
from benchmarks.common import Turn, fastest, in_turns, options, report
from benchmarks.pillow_loader import pillow_batches
from data_prep.cores import usable_cores
from data_prep.folder.manifest import Manifest, Origin, file_entry, write_manifest
from data_prep.folder.writers import write_array
from pipelines import Stream, open_loaders

LABELED, UNLABELED_VIEWS, IMAGES, CLASSES = 64, ("weak", "strong", "strong"), 2048, 10
STREAMS = {"labeled": Stream("labeled", ("weak",)), "unlabeled": Stream("unlabeled", UNLABELED_VIEWS)}
SAMPLES = LABELED * (1 + len(UNLABELED_VIEWS))
WARM = 16  # steps until queues are as they stay
CORES = usable_cores()


def main() -> None:
    """Measure and print the JSON line."""
    parser = options(__doc__, rounds=9, seconds=120)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64], help="height and width in pixels")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of a turn, timed (default 0.5)")
    parser.add_argument("--images", type=int, default=IMAGES, help="images in the data set")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cases: dict[str, Turn] = {}
        for side in arguments.sides:
            folder = Path(name) / str(side)
            write_photographs(folder, side, arguments.images)
            if find_spec("ffcv"):
                write_photographs(folder / "jpeg90", side, arguments.images, kept_as="jpeg90")
            cases |= cases_of(folder, side, arguments.turn)
        times = in_turns(cases, arguments.rounds, arguments.seconds, warmup=0)  # each turn opens its loader anew
    took = {name: fastest(values) for name, values in times.items()}
    ratios = {name: took[f"DataLoader {name.split()[1]}"] / seconds for name, seconds in took.items()}
    report("loaders", ratios, times, "sample", labeled=LABELED, views=UNLABELED_VIEWS, cores=CORES)


def cases_of(folder: Path, side: int, least: float) -> dict[str, Turn]:
    """Every case at one size of image, named with it."""
    makers: dict[str, Callable[[], Iterator[Any]]] = {
        name: partial(our_batches, folder, name)
        for name, module in (("resident", "numba"), ("ffcv", "ffcv"), ("dali", "nvidia.dali"))
        if find_spec(module)
    }
    if "ffcv" in makers:
        makers["jpeg90"] = partial(our_batches, folder / "jpeg90", "ffcv")
    makers["DataLoader"] = partial(pillow_batches, folder, LABELED, CORES)
    cases = {f"{name} {side}": partial(seconds_per_sample, make, SAMPLES, least) for name, make in makers.items()}
    if "ffcv" in makers:
        read = partial(ffcv_images, folder / "train.beton")
        cases[f"reading {side}"] = partial(seconds_per_sample, read, 2 * LABELED, least)
    return cases


def seconds_per_sample(make: Callable[[], Iterator[Any]], samples: int, least: float) -> float:
    """Open, take WARM batches untimed, time as many and for `least` seconds at least, close."""
    batches = make()
    with closing(batches):  # type: ignore[type-var]
        for _ in islice(batches, WARM):
            pass
        start = time.perf_counter()
        for taken, _ in enumerate(batches, 1):
            seconds = time.perf_counter() - start
            if taken >= WARM and seconds >= least:
                return seconds / taken / samples
    raise RuntimeError(f"a loader ended within {WARM} steps and {least:g} seconds")


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
