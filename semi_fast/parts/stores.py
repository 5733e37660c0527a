"""Stores of what earlier steps saw, the same on every rank and written without a shape that depends on data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from semi_fast.parts.statistics import class_counts

LEAST = 1e-12  # of a number whose logarithm is taken


@torch.no_grad()
def write_some(table: Tensor, places: Tensor, values: Tensor, chosen: Tensor) -> None:
    """table[places[i]] = values[i] for every row i that is chosen.

    The other rows write once more what the first chosen one does; where none is chosen, what is there already.

    Args:
        table: (R, ...). places: (n,) int64, those of chosen rows different from each other. values: (n, ...).
        chosen: (n,) bool.
    """
    rows = torch.where(chosen, torch.arange(len(chosen), device=chosen.device), chosen.long().argmax())
    places = places[rows]
    table.index_copy_(0, places, torch.where(chosen.any(), values[rows].to(table.dtype), table[places]))


@torch.no_grad()
def weighted_order(weights: Tensor, uniform: Tensor) -> Tensor:
    """All places in the order of draws without replacement, by weight (Gumbel's trick). (n,), (n,) -> (n,) int64.

    Args:
        weights: >= 0; places of weight infinity come first and those of weight 0 last, each in their order.
        uniform: in [0, 1).
    """
    gumbel = -(-uniform.clamp(LEAST, 1 - 2**-24).log()).log()
    return (weights.log() + gumbel).argsort(descending=True, stable=True)


def power_law(counts: Tensor, power: float) -> Tensor:
    """phi_k = n_k^-a / max_j n_j^-a, 1 for the rarest class. Counts (K,), at least 1 each -> (K,) in (0, 1]."""
    return (counts.min() / counts) ** power


class FeaturePool(nn.Module):
    """R features with their classes, kept balanced: rare classes enter more often, frequent ones leave more often.

    Args:
        num_classes: K. num_features: d. size: R.
        power: lambda of the probability phi_k(n; lambda) to enter, n being the pool's count of each class, at least 1,
            and of the weight 1 - phi_k to leave. *released*: at least 0.001, so that nothing enters but the classes
            that are not in the pool until every class is.
    """

    features: Tensor  # (R, d) float32
    classes: Tensor  # (R,) int64; -1 where a place is free

    def __init__(self, num_classes: int, num_features: int, size: int, power: float) -> None:
        super().__init__()
        self.num_classes, self.power = num_classes, power
        self.register_buffer("features", torch.zeros(size, num_features))
        self.register_buffer("classes", torch.full((size,), -1))

    def counts(self) -> Tensor:
        """Features of each class, (K,) int64."""
        return class_counts(self.classes.clamp_min(0), self.classes >= 0, self.num_classes)

    @torch.no_grad()
    def put(self, features: Tensor, classes: Tensor, mask: Tensor, uniform: Tensor, leaving: Tensor) -> None:
        """Offer a step's features, in order; in a full pool each that enters takes the place of a drawn one.

        Args:
            features: (n, d) float32. classes: (n,) int64. mask: (n,) bool, those offered.
            uniform: (n,) float32 in [0, 1), decides who enters. leaving: (R,) likewise, who leaves.
        """
        rates = power_law(self.counts().clamp_min(1), self.power)
        enters = mask & (uniform < rates[classes])
        rank = enters.cumsum(0) - 1
        enters &= rank < len(self.classes)
        free = self.classes < 0
        weights = torch.where(free, torch.inf, (1.0 - rates[self.classes.clamp_min(0)]).clamp_min(LEAST))
        places = weighted_order(weights, leaving)[rank.clamp(0, len(self.classes) - 1)]
        write_some(self.features, places, features, enters)
        write_some(self.classes, places, classes, enters)

    @torch.no_grad()
    def draw(self, weights: Tensor, count: int, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Different features, each drawn by the weight of its class.

        Args:
            weights: (K,) > 0. count: G <= R. uniform: (R,) float32 in [0, 1).

        Returns: features (G, d), their classes (G,), and which of them there are, (G,) bool: all once G are stored.
        """
        stored = self.classes >= 0
        order = weighted_order(torch.where(stored, weights[self.classes.clamp_min(0)], 0.0), uniform)
        chosen = order[:count]
        return self.features[chosen], self.classes[chosen].clamp_min(0), stored[chosen]


class ImageRing(nn.Module):
    """The newest S images of each class and source, as bytes.

    Args:
        sources: N, kinds of images that are kept apart. num_classes: K. size: S. resolution: side of the images.
        mean, std: of the data set, by channel, in units of pixels / 255: what images are normalized by.
    """

    images: Tensor  # (N * K * S, 3, H, W) uint8
    pushed: Tensor  # (N, K) int64, images ever taken in
    mean: Tensor  # (3, 1, 1) float32; like std, not saved
    std: Tensor

    def __init__(
        self, sources: int, num_classes: int, size: int, resolution: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.num_classes, self.size = num_classes, size
        shape = (sources * num_classes * size, 3, resolution, resolution)
        self.register_buffer("images", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("pushed", torch.zeros(sources, num_classes, dtype=torch.int64))
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @property
    def counts(self) -> Tensor:
        """Images stored of each source and class, (N, K) int64 in [0, S]."""
        return self.pushed.clamp_max(self.size)

    @torch.no_grad()
    def pack(self, images: Tensor) -> Tensor:
        """Normalized images (n, 3, H, W) as bytes."""
        return ((images.float() * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def push(self, source: int, packed: Tensor, classes: Tensor, mask: Tensor) -> None:
        """Take in images of a source in order; the oldest of their class go.

        Args:
            packed: (n, 3, H, W) uint8. classes: (n,) int64. mask: (n,) bool, those to take.
        """
        every = torch.arange(self.num_classes, device=classes.device)
        members = (classes.unsqueeze(1) == every) & mask.unsqueeze(1)
        new, rank = members.sum(0), (members.cumsum(0) * members).sum(1) - 1
        kept = mask & (rank >= new[classes] - self.size)  # of more than S of a class the last S
        pushed = self.pushed[source]
        slots = (pushed[classes] + rank.clamp_min(0)) % self.size
        write_some(self.images, (classes + source * self.num_classes) * self.size + slots, packed, kept)
        pushed.add_(new)

    @torch.no_grad()
    def draw(self, sources: Tensor, weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """An image of each of these sources: a class first, by its weight among those with images, then one of its own.

        Args:
            sources: (n,) int64, each with an image. weights: (N, K) > 0. uniform: (n, 2) float32 in [0, 1).

        Returns: normalized images (n, 3, H, W) float32, and their classes, (n,) int64.
        """
        counts = self.counts
        edges = (weights * (counts > 0)).double().cumsum(1)[sources]
        aim = uniform[:, :1].double() * edges[:, -1:]
        classes = (edges <= aim).sum(1).clamp_max(self.num_classes - 1)
        stored = counts[sources, classes]
        slots = (uniform[:, 1].double() * stored).long()
        drawn = self.images[((sources * self.num_classes) + classes) * self.size + slots]
        return (drawn.float() / 255 - self.mean) / self.std, classes
