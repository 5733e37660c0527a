"""Plans: the random numbers of views, drawn apart from their pixels.

A plan is int32, one row a view, and says all that a kernel needs to know besides pixels:

| column          | meaning                                                                                      |
|-----------------|----------------------------------------------------------------------------------------------|
| `FLIP`          | 1: mirror left to right before the crop                                                      |
| `TOP`, `LEFT`   | corner of the crop relative to the (flipped) image, in pixels, within [-pad, pad]            |
| `HEIGHT`        | rows of the crop, resized to the image's size before all else; 0: it has that size, padded   |
| `WIDTH`         | columns of the crop; 0 where `HEIGHT` is                                                     |
| `BORDER`        | what lies outside: `REFLECT` (numpy's `reflect` padding) or `BLACK`                          |
| `CUT`..`CUT + 3`| cutout box x0, y0, x1, y1 in pixels, x1 and y1 exclusive; an empty box changes nothing       |
| `GRAY`          | value 0..255 that fills the cutout, in all channels                                          |
| `FIRST`         | 1: the operations come before flip and crop, 0: after them                                   |
| `OPS`..         | rows of the parameter table (`randaugment.parameter_table`) to apply in turn; 0 does nothing |

A view of n operations takes 5 + 4n numbers u in [0, 1), float64, from one `torch.rand` call for all rows, in order:
flip (u < 1/2), top and left (floor(u (2 pad + 1)) - pad), cutout center x and y (u * side), then for each operation
which (floor(u * operations)), whether (u < probability), level (floor(u * levels)), sign (u < 1/2: +). All are drawn
whether or not the view uses them. They come from a CPU generator whatever the device, so that a batch is the same
everywhere, and do not depend on the number of threads.

A view with an `area` takes 20 more, area and ratio of the 10 tries of torchvision's RandomResizedCrop: the first whose
height and width fit is the crop, anywhere in the image (top = floor(u (rows - height + 1))). Where none does, it is the
largest in the middle that has an allowed ratio. A view with jitter takes 4 more: the order (floor(6 u)) of brightness,
contrast and saturation, which come before the operations, and the factor of each (floor(u * factors)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment.ops_cpu import cached, jit
from pipelines.augment.randaugment import COLUMNS, find_ops, jitter_tables, parameter_table
from pipelines.augment.views import BORDERS, View

FLIP, TOP, LEFT, BORDER, CUT, GRAY, FIRST, HEIGHT, WIDTH, OPS = 0, 1, 2, 3, 4, 8, 9, 10, 11, 12
REFLECT, BLACK = BORDERS["reflect"], BORDERS["black"]
TRIES = 10
ORDERS = np.array(list(permutations(range(3))))


class Planner:
    """Draws plans of the given views for images of one size.

    Attributes:
        table: (T, 7) float64 tensor, the parameter table that the `OPS` columns of its plans refer to.
        columns: width of its plans.
    """

    def __init__(self, views: Sequence[View], height: int, width: int) -> None:
        self.height, self.width = height, width
        self.columns = OPS + max((view.n + 3 * any(view.jitter) for view in views), default=0)
        tables = [np.zeros((1, COLUMNS))]
        self._drawn: dict[View, tuple[int, tuple[Any, ...]]] = {}  # how many numbers, and what turns them into plans
        for view in dict.fromkeys(views):
            added = [*jitter_tables(view.jitter), parameter_table(find_ops(view.ops), view.levels, height, width)]
            first_rows = np.cumsum([sum(map(len, tables)), *map(len, added)])
            tables += added
            numbers = 5 + 4 * view.n + (2 * TRIES if view.area else 0) + (4 if any(view.jitter) else 0)
            self._drawn[view] = numbers, self._constants(view, tuple(first_rows.tolist()))
        self.table = torch.from_numpy(np.concatenate(tables))

    def _constants(self, view: View, rows: tuple[int, ...]) -> tuple[Any, ...]:
        """What `_fill` takes besides draws. rows: of the table, where those of each of jitter's operations and of the
        others begin, and the end."""
        return (
            (self.height, self.width),
            (int(view.pad * self.height), int(view.pad * self.width)),
            view.cutout * min(self.height, self.width),
            (int(view.flip), BORDERS[view.border], view.gray, int(view.ops_first)),
            (view.n, len(view.ops), view.levels[1] - view.levels[0] + 1, rows[3]),
            float(view.probability),
            tuple(map(float, view.area or (0, 0))),
            tuple(map(float, view.ratio)),
            any(view.jitter),
            rows[:4],
        )

    def sample_all(
        self, views: Sequence[View], n: int, generator: torch.Generator, *, rank: int = 0, world: int = 1
    ) -> NDArray[np.int32]:
        """Plans of `n` images in each of the views, view by view: (len(views) * n, columns) int32.

        Numbers are drawn for the `n * world` images of all ranks, and those of this rank's images are used: an image of
        the global batch has the same plan however many processes share it. Costs every rank some 10 ns a number drawn.
        """
        mine = np.arange(n) + rank * n
        plans = []
        # Equal views in a row take one call, which draws the same numbers as one call each.
        for view, same in groupby(views):
            count = len(list(same))
            keep = (np.arange(count)[:, None] * n * world + mine).reshape(-1) if world > 1 else None
            plans.append(self.sample(view, count * n * world, generator, keep))
        return np.concatenate(plans)

    def sample(
        self, view: View, n: int, generator: torch.Generator, keep: NDArray[np.int64] | None = None
    ) -> NDArray[np.int32]:
        """Plans of `n` images: (n, columns) int32. `view` must be one of those given to the constructor.

        With `keep`, (m,) indices in [0, n): the plans of those alone, (m, columns).
        """
        numbers, constants = self._drawn[view]
        draws = torch.rand((n, numbers), dtype=torch.float64, generator=generator).numpy()
        if keep is not None:
            draws = draws[keep]
        plan = np.empty((len(draws), self.columns), np.int32)
        _fill(plan, draws, *constants)
        return plan


@jit
def _crop_size(u, height, width, area, ratio):
    """Height and width of a resized crop from 2 TRIES numbers, and whether a try fits; where none does, the largest of
    an allowed ratio. By torchvision's RandomResizedCrop.get_params."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(TRIES):
        pixels = height * width * (area[0] + u[2 * i] * (area[1] - area[0]))
        wide = math.exp(low + u[2 * i + 1] * (high - low))
        rows, columns = int(np.rint(math.sqrt(pixels / wide))), int(np.rint(math.sqrt(pixels * wide)))
        if 0 < rows <= height and 0 < columns <= width:
            return rows, columns, True
    if width < height * ratio[0]:
        return max(int(np.rint(width / ratio[0])), 1), width, False
    return height, max(int(np.rint(min(height * ratio[1], float(width)))), 1), False


@cached
def _fill(plan, draws, size, pad, side, constants, ops, probability, area, ratio, jitter, rows):
    """Turn draws (n, 5 + 4 ops ..) into plans (n, columns).

    size: height and width. pad: rows and columns. side: of the cutout, in pixels, 0 for none. constants: flip, border,
    gray and first. ops: how many a view has, of how many, at how many levels, and the first one's row of the table.
    area, ratio: of the resized crop, area 0 for none. jitter: whether there is; rows: of the table, where those of each
    of its three operations begin, and their end.
    """
    (height, width), (flip, border, gray, first), (count, among, levels, row) = size, constants, ops
    tries, first_op = 5 + 4 * count, OPS + 3 if jitter else OPS
    factors = tries + 2 * TRIES if area[1] > 0 else tries
    for i in range(len(plan)):
        u, p = draws[i], plan[i]
        p[:] = 0
        p[FLIP] = flip * (1 - int(u[0] * 2))
        p[TOP] = int(u[1] * (2 * pad[0] + 1)) - pad[0]
        p[LEFT] = int(u[2] * (2 * pad[1] + 1)) - pad[1]
        p[BORDER], p[GRAY], p[FIRST] = border, gray, first
        if area[1] > 0:
            p[HEIGHT], p[WIDTH], fits = _crop_size(u[tries:], height, width, area, ratio)
            p[TOP] = int(u[1] * (height - p[HEIGHT] + 1)) if fits else (height - p[HEIGHT]) // 2
            p[LEFT] = int(u[2] * (width - p[WIDTH] + 1)) if fits else (width - p[WIDTH]) // 2
        if jitter:
            for slot in range(3):
                kind = ORDERS[int(u[factors] * 6), slot]
                p[OPS + slot] = rows[kind] + int(u[factors + 1 + kind] * (rows[kind + 1] - rows[kind]))
        if side > 0:
            for axis in range(2):
                edge = height if axis else width
                near = int(max(u[3 + axis] * edge - side / 2, 0.0))
                p[CUT + axis] = near
                # Pillow's rectangle includes its far corner, hence the + 1.
                p[CUT + 2 + axis] = min(int(min(near + side, float(edge))) + 1, edge)
        for slot in range(count):
            at = 5 + 4 * slot
            if u[at + 1] < probability:
                which, level, negative = int(u[at] * among), int(u[at + 2] * levels), int(u[at + 3] * 2)
                p[first_op + slot] = row + (which * levels + level) * 2 + negative
