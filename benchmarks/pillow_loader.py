"""The same batches as the back ends', by PyTorch's DataLoader and Pillow: what most training code does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks import pillow_views
from pipelines import read_info

Item = tuple[tuple[np.ndarray, ...], int]


class PillowViews(Dataset):  # type: ignore[type-arg]
    """Views of the images of a data folder; an index is (row, whether its label is known)."""

    def __init__(self, folder: Path) -> None:
        info = read_info(folder)
        self.images = np.load(folder / "train.npy", mmap_mode="r")
        self.labels = np.load(folder / "train_labels.npy")
        self.mean, self.std = np.array(info.mean, np.float32), np.array(info.std, np.float32)

    def __getitem__(self, index: tuple[int, bool]) -> Item:
        row, labeled = index
        picture = Image.fromarray(self.images[row])
        makers = (pillow_views.weak,) if labeled else (pillow_views.weak, pillow_views.strong, pillow_views.strong)
        draws = torch.rand(len(makers), 13, dtype=torch.float64).tolist()
        views = [make(picture, numbers) for make, numbers in zip(makers, draws, strict=True)]
        return tuple(pillow_views.finish(view, self.mean, self.std) for view in views), int(self.labels[row])


class Steps(Sampler[list[tuple[int, bool]]]):
    """For each step, `batch` labeled rows and as many unlabeled ones, without end, each reshuffled every epoch."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.batch = batch
        self.rows = {
            flag: np.load(folder / name) for flag, name in ((True, "labeled_rows.npy"), (False, "unlabeled_rows.npy"))
        }

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        streams = {flag: self._endless(flag) for flag in (True, False)}
        while True:
            yield [(next(streams[flag]), flag) for flag in (True, False) for _ in range(self.batch)]

    def _endless(self, flag: bool) -> Iterator[int]:
        generator = np.random.default_rng(int(flag))
        while True:
            yield from generator.permutation(self.rows[flag]).tolist()


def collate(items: list[Item]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Labeled images, their labels, and each view of the unlabeled ones, channels_last."""
    labeled = [views[0] for views, _ in items if len(views) == 1]
    unlabeled = [views for views, _ in items if len(views) > 1]
    x, *u = (_stack(group) for group in (labeled, *zip(*unlabeled, strict=True)))
    return x, torch.tensor([label for views, label in items if len(views) == 1]), tuple(u)


def _stack(images: list[np.ndarray] | tuple[np.ndarray, ...]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def pillow_batches(folder: Path, batch: int, workers: int) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Endless batches; the workers end with the iterator."""
    loader = DataLoader(
        PillowViews(folder), batch_sampler=Steps(folder, batch), num_workers=workers, collate_fn=collate
    )
    yield from loader
