"""Loaders: the batches of a data set, exactly as the network takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.arrays import Arrays
from pipelines.augment.op import augment
from pipelines.augment.plan import Planner
from pipelines.augment.views import VIEWS, View, find_views
from pipelines.batch import Batch, Info, Sizes
from pipelines.order import balanced_at, by_class, indices_at, part_number, plan_seed
from pipelines.prefetch import prefetched

T = TypeVar("T")
STEPS_A_RUN = 16  # whose random numbers are drawn in one go


class Reader(Protocol):
    """A back end that delivers stored pixels; the views are made from them by the fused kernel."""

    name: str

    def read(
        self, split: str, rows: Iterable[NDArray[np.int64]], most: int
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Read rows of a split ("train" or "test"), at most `most` at a time.

        Yields, for each array of row ids in `rows`: images (N, H, W, 3) uint8, valid until the next one is asked for
        (on the GPU where the kernel is to make the views there, or small enough to be copied to it at every step),
        and for each row id the index into `images` where its pixels are. Closing the iterator frees what it holds.
        """
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Source(NamedTuple):
    """What a stream reads: at each step the rows `rows[indices(step)]` of train.npy, in all of the views.

    size is images a step; rows, and labels where its part has them, are (n,) int64.
    """

    name: str
    views: tuple[View, ...]
    size: int
    rows: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    indices: Callable[[int], NDArray[np.int64]]


class Loaders:
    """The batches of one data set for one process. Make it with `pipelines.open_loaders`.

    Attributes:
        info: the facts about the data set.
        sizes: the streams, and how many images of each a step takes.
        backend: name of the back end in use.
        reason: why it was chosen.
        labeled: rows of train.npy and their labels, (n,) int64 each, that the streams with part="labeled" read.
        relabeled: whether these are others than those that were built.
        unlabeled_rows: (n,) int64, the rows that the streams with part="unlabeled" read.
    """

    def __init__(
        self,
        arrays: Arrays,
        reader: Reader,
        sizes: Sizes,
        policies: Mapping[str, View],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        threads: int,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        reason: str = "as set",
        kernel_on_gpu: bool = False,
    ) -> None:
        self.info: Info = arrays.info
        self.sizes = sizes
        self.backend, self.reason = reader.name, reason
        self.labeled = arrays.labeled_rows, arrays.train_labels[arrays.labeled_rows]
        self.relabeled = False
        self.unlabeled_rows = arrays.unlabeled_rows
        self._arrays, self._reader, self._phase = arrays, reader, phase
        self._shard = {"rank": rank, "world": sizes.world}
        self._seed, self._device, self._dtype, self._threads = seed, device, dtype, threads
        self._on_gpu = kernel_on_gpu
        self._views = {name: find_views(stream.views, policies) for name, stream in sizes.streams.items()}
        side = self.info.resolution
        self._planner = Planner([*sum(self._views.values(), ()), VIEWS["plain"]], side, side)
        self._mean, self._std = (torch.tensor(v, dtype=torch.float64) for v in (self.info.mean, self.info.std))

    def train(self, start_step: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Endless batches from `start_step` on: the same as starting at 0 and skipping that many.

        Args:
            state: what `state(start_step)` gave in an earlier process, where it gave anything.
        """
        if start_step < 0:
            raise ValueError(f"start_step must be 0 or more, got {start_step}")
        sources = self._sources()
        rows = in_runs(partial(self._rows, sources), start_step)
        read = self._reader.read("train", rows, sum(source.size for source in sources))
        return prefetched(self._batches(sources, start_step, read), self._device)

    def state(self, step: int) -> dict[str, Any] | None:
        """What `train(step)` of a later process needs to begin at once: plain values, to be saved with a checkpoint.

        None where it needs nothing, as here: a batch is a function of seed, step and labeled rows.
        """
        return None

    def relabel(self, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Let streams with part="labeled" read these rows of train.npy with these labels, from the next `train` on.

        Args:
            rows, labels: (n,) int64, n at least 1; a row may come more than once. They are copied.

        Raises: ValueError for rows or labels out of range.
        """
        rows, labels = np.array(rows, np.int64), np.array(labels, np.int64)
        if rows.ndim != 1 or rows.shape != labels.shape or not len(rows):
            raise ValueError(f"rows and labels must be (n,), n at least 1, got {rows.shape} and {labels.shape}")
        _require_within("rows", rows, self.info.num_train)
        _require_within("labels", labels, self.info.num_classes)
        self.labeled, self.relabeled = (rows, labels), True

    def plain(self, rows: NDArray[np.int64], batch: int = 256) -> Iterator[Tensor]:
        """The plain views of these rows (n,) of train.npy, in order: (b, 3, H, W), b = batch but in the last.

        Raises: ValueError for a row out of range.
        """
        _require_within("rows", rows, self.info.num_train)
        return (images for _, images in self._sweep("train", np.asarray(rows, np.int64), batch))

    def test(self, batch: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the test images once, in order, plain: x (b, 3, H, W), y (b,) int64; the last is short.

        The shares of all ranks, one after the other, are the test set: no image is in two of them.
        """
        labels = self._arrays.test_labels
        return self._shared("test", np.arange(len(labels), dtype=np.int64), labels, batch)

    def validation(self, batch: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """`test` of the validation images; nothing where the data set has none."""
        return self._shared("train", self._arrays.validation_rows, self._arrays.train_labels, batch)

    def _shared(
        self, split: str, rows: NDArray[np.int64], labels: NDArray[np.int64], batch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of these rows of a split, plain, with their labels."""
        rank, world = self._shard["rank"], self._shard["world"]
        share = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
        swept = self._sweep(split, share, batch)
        return ((images, self._to_device(torch.from_numpy(labels[chosen]))) for chosen, images in swept)

    def hidden_labels(self) -> NDArray[np.int64]:
        """Class of every row of train.npy, -1 where unknown: for reports, never for training. (N,) int64."""
        return self._arrays.train_labels.copy()

    def close(self) -> None:
        """Free threads and memory; iterators handed out before must not be used any more."""
        self._reader.close()

    def _sources(self) -> list[Source]:
        """What the streams read from now on."""
        labeled, classes = self.labeled
        every = np.union1d(self._arrays.labeled_rows, self.unlabeled_rows)
        pools = {"labeled": (labeled, classes), "unlabeled": (self.unlabeled_rows, None), "all": (every, None)}
        sources = []
        for name, stream in self.sizes.streams.items():
            (rows, labels), size = pools[stream.part], self.sizes.of(name)
            order = partial(balanced_at, by_class(classes)) if stream.balanced else partial(indices_at, len(rows))
            indices = partial(order, batch=size, seed=self._seed, part=part_number(name), **self._shard)
            sources.append(Source(name, self._views[name], size, rows, labels, indices))
        return sources

    def _rows(self, sources: Sequence[Source], step: int) -> NDArray[np.int64]:
        """Rows of train.npy of all streams for a step."""
        return np.concatenate([source.rows[source.indices(step)] for source in sources])

    def _plan(self, sources: Sequence[Source], step: int) -> NDArray[np.int32]:
        """Plans of all views of a step, stream by stream and view by view."""
        plans = []
        for source in sources:
            generator = torch.Generator().manual_seed(plan_seed(self._seed, part_number(source.name), step))
            plans.append(self._planner.sample_all(source.views, source.size, generator, **self._shard))
        return np.concatenate(plans)

    def _batches(
        self, sources: Sequence[Source], start: int, read: Iterator[tuple[Tensor, NDArray[np.int64]]]
    ) -> Iterator[Batch]:
        groups, labeled = self.sizes.groups, [source for source in sources if source.labels is not None]
        sizes = [source.size for source in (*labeled, *sources)]
        ends = np.cumsum([source.size for source in sources])
        images = [np.arange(end - source.size, end) for source, end in zip(sources, ends, strict=True)]
        # The image of each view, among those of a step.
        shown = np.concatenate([np.tile(own, len(source.views)) for source, own in zip(sources, images, strict=True)])
        try:
            drawn = in_runs(partial(self._drawn, sources), start)
            for (pixels, index), (plan, numbers) in zip(read, drawn, strict=False):
                views = self._finish(pixels, index[shown], plan)
                slices = iter(self._to_device(numbers).split(sizes))
                labels = {source.name: next(slices) for source in labeled}
                yield Batch(views, groups, labels, {source.name: next(slices) for source in sources})
        finally:
            read.close()  # type: ignore[attr-defined]

    def _drawn(self, sources: Sequence[Source], step: int) -> tuple[NDArray[np.int32], Tensor]:
        """Plans of a step; its labels, then its rows, stream by stream: in one tensor, for one copy to the device."""
        labels = [source.labels[source.indices(step)] for source in sources if source.labels is not None]
        return self._plan(sources, step), torch.from_numpy(np.concatenate([*labels, self._rows(sources, step)]))

    def _sweep(self, split: str, rows: NDArray[np.int64], batch: int) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """The plain views of these rows of a split in order, at most `batch` at a time, with their rows."""
        if batch < 1:
            raise ValueError(f"batch must be 1 or more, got {batch}")
        parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        return self._plain_views(parts, self._reader.read(split, parts, batch))

    def _plain_views(
        self, parts: Sequence[NDArray[np.int64]], read: Iterator[tuple[Tensor, NDArray[np.int64]]]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        try:
            for rows, (images, index) in zip(parts, read, strict=True):
                plan = self._planner.sample(VIEWS["plain"], len(rows), torch.Generator())
                yield rows, self._finish(images, index, plan)
        finally:
            read.close()  # type: ignore[attr-defined]

    def _finish(self, images: Tensor, index: NDArray[np.int64], plan: NDArray[np.int32]) -> Tensor:
        """The views of a plan, on the device; view i is made of `images[index[i]]`."""
        if self._on_gpu and not images.is_cuda:
            images = self._to_device(images)
        with self._phase("augment"):
            views = augment(
                images,
                torch.from_numpy(index),
                torch.from_numpy(plan),
                self._planner.table,
                self._mean,
                self._std,
                self._dtype,
                self._threads,
            )
        return self._to_device(views)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def in_runs(make: Callable[[int], T], start: int) -> Iterator[T]:
    """make(step) for `start` and all steps after it, made for `STEPS_A_RUN` steps at a time.

    Small work that takes turns with a network finds all caches cold, and takes twice as long.
    """
    for first in count(start, STEPS_A_RUN):
        yield from [make(step) for step in range(first, first + STEPS_A_RUN)]


def _require_within(name: str, values: NDArray[np.int64], limit: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= limit):
        raise ValueError(f"{name} must be within 0..{limit - 1}, got {values.min()}..{values.max()}")
