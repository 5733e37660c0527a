"""Options that the build commands share."""

from pathlib import Path
from typing import Annotated

import typer

SPLIT, RUN = "The split", "The build"
N1 = Annotated[int | None, typer.Option(help="Labeled images of the largest class.", rich_help_panel=SPLIT)]
M1 = Annotated[
    int | None, typer.Option(help="Unlabeled images of the largest class, besides those.", rich_help_panel=SPLIT)
]
GammaL = Annotated[
    str | None, typer.Option(help="Imbalance of the labeled set: largest / smallest class.", rich_help_panel=SPLIT)
]
GammaU = Annotated[
    str | None,
    typer.Option(
        help="Imbalance of the unlabeled set: 100, 1 (uniform), or 1/100 (reversed: the last class is the largest).",
        rich_help_panel=SPLIT,
    ),
]
Res = Annotated[
    int | None,
    typer.Option(help="Side of the stored images, in pixels. Default: the data set's.", rich_help_panel=SPLIT),
]
Selection = Annotated[
    str,
    typer.Option(
        help="Which images of a class: the first ones in the data set's order, or random.", rich_help_panel=SPLIT
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of --selection random.", rich_help_panel=SPLIT)]
Disjoint = Annotated[
    bool, typer.Option("--disjoint", help="Keep the labeled images out of the unlabeled set.", rich_help_panel=SPLIT)
]
SourceOption = Annotated[
    Path | None,
    typer.Option(
        help="The raw data: official archive (packed or not), or folder or zip of class folders.", rich_help_panel=RUN
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder to make. Default: data/<name with its split>.", rich_help_panel=RUN)
]
Cache = Annotated[
    Path | None, typer.Option(help="Where downloads are kept. Default: ~/.cache/semi-fast.", rich_help_panel=RUN)
]
Workers = Annotated[
    int | None, typer.Option(help="Processes that decode images. Default: one a core.", rich_help_panel=RUN)
]
Format = Annotated[
    list[str],
    typer.Option(
        help="Forms besides the arrays, separated by commas or given one by one: ffcv (.beton files), dali "
        "(tar shards).",
        metavar="TEXT",
        rich_help_panel=RUN,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace a folder that holds something else; give up an unfinished build of other options.",
        rich_help_panel=RUN,
    ),
]
OnBad = Annotated[
    str, typer.Option(help="At unreadable images: error (all are named at the end), or skip them.", rich_help_panel=RUN)
]
ShardImages = Annotated[
    int | None, typer.Option(help="Images in a DALI shard, at most. Default: 10,000.", rich_help_panel=RUN)
]
