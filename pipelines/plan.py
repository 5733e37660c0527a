"""Plans: the random numbers of views, drawn apart from their pixels.

A plan is int32, one row a view, and says all that a kernel needs to know besides pixels:

| column          | meaning                                                                                      |
|-----------------|----------------------------------------------------------------------------------------------|
| `FLIP`          | 1: mirror the stored image left to right first                                               |
| `TOP`, `LEFT`   | corner of the crop relative to the (flipped) image, in pixels, within [-pad, pad]            |
| `BORDER`        | what lies outside: `REFLECT` (numpy's `reflect` padding) or `BLACK`                          |
| `CUT`..`CUT + 3`| cutout box x0, y0, x1, y1 in pixels, x1 and y1 exclusive; an empty box changes nothing       |
| `GRAY`          | value 0..255 that fills the cutout, in all channels                                          |
| `OPS`..         | rows of the parameter table (`randaugment.parameter_table`) to apply in turn; 0 does nothing |

A view of n operations takes 5 + 4n numbers u in [0, 1), float64, from one `torch.rand` call for all rows, in order:
flip (u < 1/2), top and left (floor(u (2 pad + 1)) - pad), cutout center x and y (u * side), then for each operation
which (floor(u * operations)), whether (u < probability), level (floor(u * levels)), sign (u < 1/2: +). All are drawn
whether or not the view uses them. They come from a CPU generator whatever the device, so that a batch is the same
everywhere, and do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.randaugment import COLUMNS, find_ops, parameter_table

if TYPE_CHECKING:
    from pipelines.views import View

FLIP, TOP, LEFT, BORDER, CUT, GRAY, OPS = 0, 1, 2, 3, 4, 8, 9
REFLECT, BLACK = 0, 1
BORDERS = {"reflect": REFLECT, "black": BLACK}


class Planner:
    """Draws plans of the given views for images of one size.

    Attributes:
        table: (T, 7) float64 tensor, the parameter table that the `OPS` columns of its plans refer to.
        columns: width of its plans.
    """

    def __init__(self, views: Sequence[View], height: int, width: int) -> None:
        self.height, self.width = height, width
        self.columns = OPS + max((view.n for view in views), default=0)
        tables = [np.zeros((1, COLUMNS))]
        self._first_row: dict[View, int] = {}
        for view in dict.fromkeys(views):
            self._first_row[view] = sum(map(len, tables))
            tables.append(parameter_table(find_ops(view.ops), view.levels, height, width))
        self.table = torch.from_numpy(np.concatenate(tables))

    def sample_all(self, views: Sequence[View], n: int, generator: torch.Generator) -> NDArray[np.int32]:
        """Plans of `n` images in each of the views, view by view: (len(views) * n, columns) int32."""
        # Equal views in a row take one call, which draws the same numbers as one call each.
        runs = [(view, len(list(same))) for view, same in groupby(views)]
        return np.concatenate([self.sample(view, count * n, generator) for view, count in runs])

    def sample(self, view: View, n: int, generator: torch.Generator) -> NDArray[np.int32]:
        """Plans of `n` images: (n, columns) int32. `view` must be one of those given to the constructor."""
        draws = torch.rand((n, 5 + 4 * view.n), dtype=torch.float64, generator=generator).numpy()
        plan = np.zeros((n, self.columns), np.int32)
        if view.flip:
            plan[:, FLIP] = draws[:, 0] < 0.5
        for column, draw, side in ((TOP, 1, self.height), (LEFT, 2, self.width)):
            pad = int(view.pad * side)
            plan[:, column] = draws[:, draw] * (2 * pad + 1)
            plan[:, column] -= pad
        plan[:, BORDER] = BORDERS[view.border]
        plan[:, GRAY] = view.gray
        if view.cutout:
            for axis, side in ((0, self.width), (1, self.height)):
                plan[:, CUT + axis], plan[:, CUT + 2 + axis] = self._cutout(view, draws[:, 3 + axis], side)
        if view.n:
            plan[:, OPS : OPS + view.n] = self._operations(view, draws[:, 5:].reshape(n, view.n, 4))
        return plan

    def _cutout(self, view: View, draw: NDArray[np.float64], edge: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and one-past-last pixel along one axis. Both corners of Pillow's rectangle are drawn, hence the + 1."""
        side = view.cutout * min(self.height, self.width)
        near = np.maximum(0, draw * edge - side / 2).astype(np.int64)
        far = np.minimum(edge, near + side).astype(np.int64)
        return near, np.minimum(far + 1, edge)

    def _operations(self, view: View, draws: NDArray[np.float64]) -> NDArray[np.int64]:
        """Table rows of the drawn operations: (n, view.n), 0 where an operation is not applied."""
        levels = view.levels[1] - view.levels[0] + 1
        which, level = (draws[..., 0] * len(view.ops)).astype(np.int64), (draws[..., 2] * levels).astype(np.int64)
        negative = draws[..., 3] >= 0.5
        row = self._first_row[view] + (which * levels + level) * 2 + negative
        return np.where(draws[..., 1] < view.probability, row, 0)
