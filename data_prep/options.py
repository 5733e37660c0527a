"""Options that the build commands share."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

split_option = partial(typer.Option, rich_help_panel="The split")
build_option = partial(typer.Option, rich_help_panel="The build")

N1 = Annotated[int | None, split_option(help="Labeled images of the largest class.")]
M1 = Annotated[int | None, split_option(help="Unlabeled images of the largest class, besides those.")]
GammaL = Annotated[str | None, split_option(help="Imbalance of the labeled set: largest / smallest class.")]
SHAPES = (
    "100, 1 (uniform), 1/100 (reversed: the last class is the largest), middle:100 (the middle class is) or "
    "head-tail:100 (first and last are)"
)
GammaU = Annotated[str | None, split_option(help=f"Imbalance of the unlabeled set: {SHAPES}.")]
Res = Annotated[int | None, split_option(help="Side of the stored images, in pixels. Default: the data set's.")]
Selection = Annotated[
    str, split_option(help="Which images of a class: the first ones in the data set's order, or random.")
]
Seed = Annotated[int, split_option(help="Seed of --selection random.")]
Disjoint = Annotated[bool, split_option("--disjoint", help="Keep the labeled images out of the unlabeled set.")]
Out = Annotated[Path | None, build_option(help="Folder to make. Default: data/<name with its split>.")]
Cache = Annotated[Path | None, build_option(help="Where downloads are kept. Default: ~/.cache/semi-fast.")]
Workers = Annotated[int | None, build_option(help="Processes that decode images. Default: one a core.")]
FORMS = "ffcv (.beton files; ffcv:jpeg90: training images as JPEG), dali (tar shards)"
Format = Annotated[
    list[str],
    build_option(help=f"Forms besides the arrays, separated by commas or given one by one: {FORMS}.", metavar="TEXT"),
]
Force = Annotated[
    bool,
    build_option(
        "--force",
        help="Replace a folder that holds something else; give up an unfinished build of other options.",
    ),
]
AllowOverlap = Annotated[
    bool, build_option("--allow-overlap", help="Go on when test images are labeled or unlabeled ones too.")
]
OnBad = Annotated[str, build_option(help="At unreadable images: error (all are named at the end), or skip them.")]
ShardImages = Annotated[int | None, build_option(help="Images in a DALI shard, at most. Default: 10,000.")]
