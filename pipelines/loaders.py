"""Loaders: the batches of a data set, exactly as the network takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.arrays import Arrays
from pipelines.augment.op import augment, has_cuda_kernel
from pipelines.augment.plan import Planner
from pipelines.augment.views import VIEWS, View
from pipelines.batch import Batch, Info, Part
from pipelines.order import indices_at, plan_seed
from pipelines.prefetch import prefetched


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


class Loaders:
    """The batches of one data set for one process. Make it with `pipelines.open_loaders`.

    Attributes:
        info: the facts about the data set.
        backend: name of the back end in use.
        reason: why it was chosen.
        unlabeled_rows: (n,) int64, rows of train.npy.
    """

    def __init__(
        self,
        arrays: Arrays,
        reader: Reader,
        views: Sequence[View],
        labeled_view: View,
        *,
        batch: int,
        mu: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        world: int,
        threads: int,
        reason: str = "as set",
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.info: Info = arrays.info
        self.backend, self.reason = reader.name, reason
        self.unlabeled_rows, self._phase = arrays.unlabeled_rows, phase
        self._arrays, self._reader = arrays, reader
        self._views, self._labeled_view = tuple(views), labeled_view
        self._sizes = {Part.LABELED: batch, Part.UNLABELED: mu * batch if views else 0}
        self._seed, self._rank, self._world = seed, rank, world
        self._device, self._dtype, self._threads = device, dtype, threads
        self._on_gpu = device.type == "cuda" and has_cuda_kernel()
        side = self.info.resolution
        self._planner = Planner((labeled_view, *views, VIEWS["plain"]), side, side)
        self._mean, self._std = (torch.tensor(v, dtype=torch.float64) for v in (self.info.mean, self.info.std))

    def train(self, start_step: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Endless batches from `start_step` on: the same as starting at 0 and skipping that many.

        Args:
            state: what `state(start_step)` gave in an earlier process, where it gave anything.
        """
        if start_step < 0:
            raise ValueError(f"start_step must be 0 or more, got {start_step}")
        rows = (np.concatenate(self._rows(step)) for step in count(start_step))
        read = self._reader.read("train", rows, sum(self._sizes.values()))
        return prefetched(self._batches(count(start_step), read), self._device)

    def state(self, step: int) -> dict[str, Any] | None:
        """What `train(step)` of a later process needs to begin at once: plain values, to be saved with a checkpoint.

        None where it needs nothing, as here: a batch is a function of seed and step.
        """
        return None

    def test(self, batch: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the test images once, in order, plain: x (b, 3, H, W), y (b,) int64; the last is short.

        The shares of all ranks, one after the other, are the test set: no image is in two of them.
        """
        if batch < 1:
            raise ValueError(f"batch must be 1 or more, got {batch}")
        count = len(self._arrays.test_labels)
        first, last = (count * rank // self._world for rank in (self._rank, self._rank + 1))
        rows = [np.arange(i, min(i + batch, last), dtype=np.int64) for i in range(first, last, batch)]
        return self._sweep(rows, self._reader.read("test", rows, batch))

    def hidden_labels(self) -> NDArray[np.int64]:
        """Class of every row of train.npy, -1 where unknown: for reports, never for training. (N,) int64."""
        return self._arrays.train_labels.copy()

    def close(self) -> None:
        """Free threads and memory; iterators handed out before must not be used any more."""
        self._reader.close()

    def _rows(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row ids of train.npy of the labeled and the unlabeled images of a step."""
        chosen = []
        for part, rows in ((Part.LABELED, self._arrays.labeled_rows), (Part.UNLABELED, self._arrays.unlabeled_rows)):
            size = self._sizes[part]
            where = {"seed": self._seed, "part": int(part), "rank": self._rank, "world": self._world}
            chosen.append(rows[indices_at(len(rows), step, size, **where)] if size else np.empty(0, np.int64))
        return chosen[0], chosen[1]

    def _plan(self, step: int) -> NDArray[np.int32]:
        """Plans of all views of a step: labeled first, then view by view."""
        plans = []
        for part, views in ((Part.LABELED, (self._labeled_view,)), (Part.UNLABELED, self._views)):
            if not views:
                continue
            generator = torch.Generator().manual_seed(plan_seed(self._seed, int(part), step))
            size, place = self._sizes[part], {"rank": self._rank, "world": self._world}
            plans.append(self._planner.sample_all(views, size, generator, **place))
        return np.concatenate(plans)

    def _batches(self, steps: Iterable[int], read: Iterator[tuple[Tensor, NDArray[np.int64]]]) -> Iterator[Batch]:
        labeled = self._sizes[Part.LABELED]
        try:
            for step, (images, where) in zip(steps, read, strict=False):
                rows, unlabeled_rows = self._rows(step)
                gathered = np.concatenate((where[:labeled], *[where[labeled:]] * len(self._views)))
                x, *u = self._finish(images, gathered, self._plan(step)).split(
                    [labeled, *[self._sizes[Part.UNLABELED]] * len(self._views)]
                )
                y = torch.from_numpy(self._arrays.train_labels[rows])
                yield Batch(x, self._to_device(y), tuple(u), self._to_device(torch.from_numpy(unlabeled_rows)))
        finally:
            read.close()  # type: ignore[attr-defined]

    def _sweep(
        self, rows: Sequence[NDArray[np.int64]], read: Iterator[tuple[Tensor, NDArray[np.int64]]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for wanted, (images, where) in zip(rows, read, strict=True):
                plan = self._planner.sample(VIEWS["plain"], len(wanted), torch.Generator())
                y = torch.from_numpy(self._arrays.test_labels[wanted])
                yield self._finish(images, where, plan), self._to_device(y)
        finally:
            read.close()  # type: ignore[attr-defined]

    def _finish(self, images: Tensor, where: NDArray[np.int64], plan: NDArray[np.int32]) -> Tensor:
        if self._on_gpu and not images.is_cuda:
            images = self._to_device(images)
        with self._phase("augment"):
            views = augment(
                images,
                torch.from_numpy(where),
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
