"""The DALI pipeline of one stream of images: one read, then every view of it.

Import this module only where DALI is installed (`pipelines.backends.dali` checks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.pipeline import do_not_convert

from pipelines.augment.views import View
from pipelines.backends.dali_ops import Node, Table, make_table, operate

SHUFFLED = 4096  # images in the reader's shuffle buffer; the shards hold them in a shuffled order already


class Tars(NamedTuple):
    """Shards for the webdataset reader, and this process's part of them."""

    tars: tuple[Path, ...]
    indices: tuple[Path, ...]
    rank: int
    world: int


class Rows(NamedTuple):
    """Batches of (images (n, H, W, 3) uint8, ids (n, 2) int64) by their number, instead of shards."""

    batch_at: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.int64]]]


def build_pipeline(
    source: Tars | Rows,
    views: Sequence[View],
    *,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    seed: int,
    threads: int,
    device_id: int | None,
    checkpoint: bytes | None = None,
) -> Any:
    """A built pipeline whose outputs are the ids (batch, 2) int64 of row and label, then each view.

    Args:
        source: where images come from.
        views: made of each image, in float32 (batch, side, side, 3), normalized.
        mean, std: by channel, in units of pixels / 255.
        seed: of order and views, within 0..2^31 - 1.
        device_id: number of the GPU, None to stay on the CPU.
        checkpoint: where to go on; None to begin.
    """

    means, stds = [255.0 * m for m in mean], [255.0 * s for s in std]
    policies = [(view, make_table(view, side) if view.n else None) for view in views]

    @pipeline_def(enable_conditionals=True)
    def stream() -> tuple[Node, ...]:
        image, ids = _read(source, side)
        if device_id is not None:
            image = image.gpu()
        finished = [
            fn.crop_mirror_normalize(
                _view(image, view, table, side), output_layout="HWC", dtype=types.FLOAT, mean=means, std=stds
            )
            for view, table in policies
        ]
        return (ids, *finished)

    pipeline = stream(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        seed=seed,
        enable_checkpointing=True,
        checkpoint=checkpoint,
    )
    pipeline.build()
    return pipeline


def _read(source: Tars | Rows, side: int) -> Any:
    """Images (side, side, 3) uint8 and their ids (2,) int64: two nodes."""
    if isinstance(source, Rows):
        return fn.external_source(source.batch_at, num_outputs=2, batch=True, layout=["HWC", ""])
    members: Any = fn.readers.webdataset(
        name="reader",
        paths=[str(path) for path in source.tars],
        index_paths=[str(path) for path in source.indices],
        ext=["bin", "ids"],
        dtypes=[types.UINT8, types.INT64],
        random_shuffle=True,
        initial_fill=SHUFFLED,
        shard_id=source.rank,
        num_shards=source.world,
    )
    flat, ids = members
    return fn.reshape(flat, shape=[side, side, 3], layout="HWC"), ids


def _view(image: Node, view: View, table: Table | None, side: int) -> Node:
    """pipelines.augment.views.View in DALI's operators; without a table, it has no operations."""
    if not view.ops_first:
        image = _flip_and_crop(image, view, side)
    if table is not None:
        for _ in range(view.n):
            image = operate(image, table, side)
    if view.ops_first:
        image = _flip_and_crop(image, view, side)
    if view.cutout:
        image = _cut_out(image, view, side)
    return image


def _flip_and_crop(image: Node, view: View, side: int) -> Node:
    """One operator for both: each of the possible results is a matrix."""
    moves = _moves(view, side)
    which = fn.random.uniform(values=list(range(len(moves))), dtype=types.INT32)
    return fn.experimental.warp_perspective(
        image,
        matrix=types.Constant(moves)[which],
        interp_type=types.INTERP_NN,
        border_mode={"reflect": "reflect_101", "black": "constant"}[view.border],
        fill_value=0,
    )


@do_not_convert
def _moves(view: View, side: int) -> NDArray[np.float32]:
    """Every flip and crop of a view as a matrix from result to source: (M, 3, 3)."""
    pad = int(view.pad * side)
    moves = [
        [[sign, 0, left if sign > 0 else side - left], [0, 1, top], [0, 0, 1]]
        for sign in ((1, -1) if view.flip else (1,))
        for top in range(-pad, pad + 1)
        for left in range(-pad, pad + 1)
    ]
    return np.array(moves, np.float32)


def _cut_out(image: Node, view: View, side: int) -> Node:
    """The boxes of pipelines.augment.plan.Planner: a real center, the far corner included."""
    width = view.cutout * side
    center = fn.random.uniform(range=[0.0, float(side)], shape=[2])
    near = dali_math.floor(dali_math.max(center - width / 2, 0.0))
    size = float(int(width) + 1)
    return fn.erase(
        image, anchor=near, shape=[size, size], axis_names="HW", fill_value=float(view.gray), normalized=False
    )
