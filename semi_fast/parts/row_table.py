"""A row of numbers for each unlabeled image, the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semi_fast.processes.gather import gather_ranks


class RowTable(nn.Module):
    """A table (m, n) with a row for each of the m unlabeled images, written and read by rows of train.npy.

    Args:
        num_train: rows of train.npy.
        rows: m. width: n.
        fill: what all numbers are at the start.
    """

    values: Tensor  # (m, n) float32
    places: Tensor  # (num_train,) int64, which row of the table each row of train.npy has

    def __init__(self, num_train: int, rows: int, width: int, fill: float) -> None:
        super().__init__()
        self.register_buffer("values", torch.full((rows, width), fill))
        self.register_buffer("places", torch.arange(num_train).clamp_max_(max(0, rows - 1)))

    @torch.no_grad()
    def hold(self, rows: Tensor) -> None:
        """Give these rows of train.npy, (m,) int64, the rows of the table, in order. Call it before the first step."""
        self.places[rows.to(self.places.device)] = torch.arange(len(rows), device=self.places.device)

    def read(self, rows: Tensor) -> Tensor:
        """The numbers of these rows of train.npy, (b,) int64 -> (b, n) float32."""
        return self.values[self.places[rows]]

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor) -> None:
        """Set the numbers of these rows of train.npy on every rank, by those of all ranks in rank order.

        Of a row that comes more than once the last is kept, whatever the order of the device's threads.

        Args:
            rows: (b,) int64 of this rank. values: (b, n) float32.
        """
        rows, values = gather_ranks(rows).flatten(), gather_ranks(values).flatten(0, 1)
        places, order = self.places[rows], torch.arange(len(rows), device=rows.device)
        last = torch.zeros_like(self.values[:, 0], dtype=torch.int64).scatter_reduce_(0, places, order, "amax")
        self.values.index_copy_(0, places, values[last[places]])
