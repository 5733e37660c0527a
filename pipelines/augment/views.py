"""A view is a policy: what is done to an image before the network sees it. Policies are data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.errors import UserError, unknown
from pipelines.augment.randaugment import FIXMATCH_OPS, OPERATIONS, find_ops

BORDERS = {"reflect": 0, "black": 1}  # what a crop sees outside of the image, and its number in a plan


@dataclass(frozen=True, kw_only=True)
class View:
    """Flip, then a random crop, then jitter, then `n` operations, then a cutout; or jitter and operations first.

    Args:
        flip: mirror left to right with probability 1/2.
        pad: padding of the crop as a fraction of the side, rounded down to pixels (1/8: 4 at 32 px); 0 = no crop.
        border: what is padded: "reflect" (without repeating the edge) or "black".
        area: smallest and largest share of the image that a crop of random size shows, which is then resized to the
            image's size; () = all of it, padded as above. Drawn uniformly, as torchvision's RandomResizedCrop does.
        ratio: smallest and largest width / height of such a crop, drawn log-uniformly.
        jitter: strengths s of brightness, contrast and saturation, each changed by a factor drawn uniformly from
            [1 - s, 1 + s], in random order; 0 = none.
        ops: names of the operations drawn from, uniformly and with replacement.
        n: how many operations are drawn.
        levels: smallest and largest level, both included, out of 10; a level is drawn for each operation.
        probability: with which each drawn operation is applied.
        cutout: side of the cutout square as a fraction of the image's shorter side; 0 = none.
        gray: pixel value 0..255 of the cutout.
        ops_first: whether the operations come before flip and crop, so that the crop's border is not operated upon.

    Raises: UserError for a value out of range or an unknown operation or border.
    """

    flip: bool = True
    pad: float = 1 / 8
    border: str = "reflect"
    area: tuple[float, ...] = ()
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    jitter: tuple[float, ...] = (0.0, 0.0, 0.0)
    ops: tuple[str, ...] = ()
    n: int = 0
    levels: tuple[int, int] = (1, 9)
    probability: float = 0.5
    cutout: float = 0.0
    gray: int = 127
    ops_first: bool = False

    def __post_init__(self) -> None:
        if self.border not in BORDERS:
            raise unknown("border", self.border, BORDERS)
        find_ops(self.ops)
        for rule, holds, got in (
            ("pad must be at least 0 and below 1", 0 <= self.pad < 1, self.pad),
            (
                "pad must be 0 where there is an area, of which nothing is padded",
                not self.area or not self.pad,
                self.pad,
            ),
            ("ops_first must be false where there is an area", not (self.area and self.ops_first), self.ops_first),
            ("area must be two numbers above 0 and up to 1, the smaller first", _is_area(self.area), self.area),
            ("ratio must be two numbers above 0, the smaller first", _ascend(self.ratio), self.ratio),
            ("jitter must be three numbers within 0..1", _are_strengths(self.jitter), self.jitter),
            ("n must be 0 or more", self.n >= 0, self.n),
            ("n must be 0 where there are no ops", self.n == 0 or bool(self.ops), self.n),
            ("levels must be two whole numbers in 0..10, the smaller first", _is_range(self.levels), self.levels),
            ("probability must be within 0..1", 0 <= self.probability <= 1, self.probability),
            ("cutout must be within 0..1", 0 <= self.cutout <= 1, self.cutout),
            ("gray must be within 0..255", 0 <= self.gray <= 255, self.gray),
        ):
            if not holds:
                raise UserError(f"A view's {rule}, got {got}")


def _is_range(levels: tuple[int, int]) -> bool:
    return len(levels) == 2 and 0 <= levels[0] <= levels[1] <= 10


def _ascend(numbers: tuple[float, ...]) -> bool:
    return len(numbers) == 2 and 0 < numbers[0] <= numbers[1]


def _is_area(numbers: tuple[float, ...]) -> bool:
    return not numbers or (_ascend(numbers) and numbers[1] <= 1)


def _are_strengths(numbers: tuple[float, ...]) -> bool:
    return len(numbers) == 3 and all(0 <= number <= 1 for number in numbers)


#: plain, weak, strong: the views of the SeMi paper (sec. 4.1), which are FixMatch's.
#: Choice: the cutout is half the side at every resolution (the released code: 16 pixels at every resolution).
VIEWS: dict[str, View] = {
    "plain": View(flip=False, pad=0),
    "weak": View(),
    "strong": View(ops=FIXMATCH_OPS, n=2, cutout=0.5),
    # The other protocol in use (DARP, ABC, CoSSL): RandAugment(3, 4), then flip and zero-padded crop, a black cutout.
    # Choice: level 4 is of this project's ranges, which are FixMatch's.
    "weak_black": View(border="black"),
    "randaugment_3_4": View(
        border="black",
        ops=tuple(name for name in OPERATIONS if name != "identity"),
        n=3,
        levels=(4, 4),
        probability=1.0,
        cutout=0.5,
        gray=0,
        ops_first=True,
    ),
    # For photographs. Choice: areas and strengths in the range of contrastive learning (MoCo v2: 0.2..1 and 0.4).
    "weak_photo": View(pad=0, area=(0.5, 1.0)),
    "strong_photo": View(pad=0, area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4), ops=FIXMATCH_OPS, n=2, cutout=0.5),
}


def find_views(names: Sequence[str], policies: Mapping[str, View] = VIEWS) -> tuple[View, ...]:
    """The policies of these names. Raises UserError naming the nearest for a name that does not exist."""
    for name in names:
        if name not in policies:
            raise unknown("view", name, policies)
    return tuple(policies[name] for name in names)
