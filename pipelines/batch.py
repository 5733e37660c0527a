"""What a training step reads and gets: streams, batches and their sizes; and the facts about a data set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from data_prep.errors import UserError, unknown

Part = Literal["labeled", "unlabeled", "all"]


class Stream(NamedTuple):
    """Images that a method reads at every step, and the views made of each.

    part: the labeled rows (as `Loaders.relabel` left them), the unlabeled ones, or "all": those of both, each once.
    views: names of policies; views of one name stand together, as in ("weak", "strong", "strong").
    balanced: draw a class first, uniformly among those with images, then one of its images; needs part="labeled".
    batch: images a step and process; None: the run's batch, times mu where part="unlabeled".
    """

    part: Part
    views: tuple[str, ...]
    balanced: bool = False
    batch: int | None = None


class Group(NamedTuple):
    """Consecutive rows of `Batch.images`: the views of one name of one stream.

    With v views of n images, row i * n + j of the v * n rows is view i of image j.
    """

    stream: str
    view: str
    rows: int


class Batch(NamedTuple):
    """One training step's images and labels, on the device, ready for the network.

    images: (N, 3, H, W), channels_last, float32 or bfloat16, normalized by the data set's mean and std: all views of
        all streams, stream by stream and view by view.
    groups: what the rows of `images` are, in order; their counts sum to N.
    labels: class ids (n,) int64 of the streams with part="labeled".
    rows: row ids into train.npy, (n,) int64, of every stream of the data set.
    """

    images: Tensor
    groups: tuple[Group, ...]
    labels: dict[str, Tensor]
    rows: dict[str, Tensor]

    def of(self, stream: str, view: str) -> Tensor:
        """The views of that name, (rows, 3, H, W): a slice of `images`. Raises: KeyError where there are none."""
        first = 0
        for group in self.groups:
            if (group.stream, group.view) == (stream, view):
                return self.images[first : first + group.rows]
            first += group.rows
        raise KeyError(f"the batch has no view '{view}' of a stream '{stream}'")

    def only(self, *groups: tuple[str, str]) -> Batch:
        """The batch with these groups, (stream, view) each, alone; with none it has no images.

        They keep their order. Images are copied but where the groups are the first ones of the batch. Labels and rows
        stay. Raises: KeyError for a group that the batch does not have.
        """
        kept = tuple(group for group in self.groups if (group.stream, group.view) in groups)
        if len(kept) < len(set(groups)):
            there = [(group.stream, group.view) for group in self.groups]
            raise KeyError(f"the batch has {there}, not all of {list(groups)}")
        if kept == self.groups[: len(kept)]:
            return self._replace(images=self.images[: sum(group.rows for group in kept)], groups=kept)
        return self._replace(images=torch.cat([self.of(*group[:2]) for group in kept]), groups=kept)

    def add(self, stream: str, view: str, images: Tensor) -> Batch:
        """The batch with a further group of images (n, 3, H, W) at its end; copies all images once.

        Raises: ValueError where the batch has that view of that stream.
        """
        if any((group.stream, group.view) == (stream, view) for group in self.groups):
            raise ValueError(f"the batch has a view '{view}' of the stream '{stream}' already")
        group = Group(stream, view, len(images))
        return self._replace(images=torch.cat((self.images, images)), groups=(*self.groups, group))


class Sizes(NamedTuple):
    """How many images a step takes.

    batch: labeled images a step and process. mu: unlabeled images for each of them. world: number of processes.
    """

    streams: Mapping[str, Stream]
    batch: int
    mu: int
    world: int

    def of(self, stream: str) -> int:
        """Images of that stream a step and process."""
        part, _, _, batch = self.streams[stream]
        return self.batch * (self.mu if part == "unlabeled" else 1) if batch is None else batch

    @property
    def groups(self) -> tuple[Group, ...]:
        """What the rows of every `Batch.images` are."""
        return tuple(
            Group(name, view, self.of(name) * len(list(same)))
            for name, stream in self.streams.items()
            for view, same in groupby(stream.views)
        )

    @property
    def images_per_step(self) -> int:
        """Views of all streams and processes: what the network sees."""
        return self.images_without(())

    def images_without(self, idle: Collection[str]) -> int:
        """The same where it sees none of those streams."""
        return self.world * sum(group.rows for group in self.groups if group.stream not in idle)

    @property
    def samples_per_step(self) -> int:
        """Images of all streams and processes, however many views are made of each."""
        return self.world * sum(map(self.of, self.streams))

    @property
    def labeled_per_step(self) -> int:
        """Images of the stream named "labeled", of all processes; 0 without such a stream."""
        return self.world * self.of("labeled") if "labeled" in self.streams else 0


class Info(NamedTuple):
    """The facts about a data set that methods and reports need, all from its manifest.

    labeled_counts are images per class, in the order of class_names. num_train counts the rows of train.npy. mean and
    std are per channel, in units of pixels / 255. num_validation counts those of its rows that choose the best
    checkpoint, and are neither labeled nor unlabeled ones. fingerprint identifies the pixels, labels and split
    (SHA-256, hex).
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    resolution: int
    labeled_counts: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_train: int
    num_labeled: int
    num_unlabeled: int
    num_test: int
    fingerprint: str
    num_validation: int = 0


def check_streams(streams: Mapping[str, Stream], views: Collection[str], info: Info) -> None:
    """Check streams against the names of the views and the images there are. Raises: UserError for what cannot be."""
    counts = {
        "labeled": info.num_labeled,
        "unlabeled": info.num_unlabeled,
        "all": info.num_labeled + info.num_unlabeled,
    }
    if not streams:
        raise UserError("streams must hold at least one stream, got none")
    for name, stream in streams.items():
        if stream.part not in get_args(Part):
            raise unknown("part of a stream", stream.part, get_args(Part))
        for view in stream.views:
            if view not in views:
                raise unknown("view", view, views)
        together = len([view for view, _ in groupby(stream.views)]) == len(set(stream.views))
        for rule, holds, got in (
            ("views must name at least one view", len(stream.views) > 0, stream.views),
            ("views of one name must stand together", together, stream.views),
            ("balanced needs part 'labeled'", not stream.balanced or stream.part == "labeled", repr(stream.part)),
            ("batch must be 1 or more", stream.batch is None or stream.batch >= 1, stream.batch),
        ):
            if not holds:
                raise UserError(f"The stream '{name}': {rule}, got {got}")
        if not counts[stream.part]:
            kind = "" if stream.part == "all" else f"{stream.part} "
            raise UserError(f"'{info.name}' has no {kind}images, which the stream '{name}' reads. Build it with some.")
