"""The commands of data_prep/build.py: a data set each, and those that show what there is."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep import options as opt
from data_prep.errors import INTERRUPTED, UserError, unknown
from data_prep.folder.manifest import PROGRAM
from data_prep.recipes.catalog import CATALOG

IMAGENET_FORMS = "ILSVRC2012: folder with train/ and val/, or with the official tars; or downsampled ImageNet's batches"
IMAGENET_FOLDERS = "$IMAGENET_DIR, data/imagenet, ~/imagenet"
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, wherever this typer keeps its click


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt, of which typer makes an exit of its own."""


class _Names(typer.core.TyperGroup):
    """Commands are data sets: a wrong name is answered with the nearest right one."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is None:
            raise unknown("data set", cmd_name, self.list_commands(ctx))
        return command


app = typer.Typer(
    cls=_Names,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def main_help(ctx: typer.Context) -> None:
    """Build long-tailed data sets as folders of memory-mapped arrays.

    A build may be interrupted at any moment: the same command goes on where it stood.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _build(name: str, out: Path | None, formats: list[str], **rest: Any) -> None:
    from data_prep.work.builder import build_dataset

    folder = build_dataset(
        name,
        _at_home(out),
        formats=[part.strip() for part in ",".join(formats).split(",") if part.strip()],
        command=f"{PROGRAM} " + shlex.join(sys.argv[1:]),
        say=_remark,
        **{option: _at_home(value) for option, value in rest.items()},
    )
    print(folder)


def _at_home(value: Any) -> Any:
    """A path with a ~ that the shell has left, as in --out=~/x, replaced; other values as they are."""
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _remark(line: str) -> None:
    print(line, file=sys.stderr)


def _long_tail_command(name: str) -> None:
    """Add the command of a long-tailed data set."""
    entry = CATALOG[name]

    def command(
        n1: opt.N1 = None,
        m1: opt.M1 = None,
        gamma_l: opt.GammaL = None,
        gamma_u: opt.GammaU = None,
        res: opt.Res = None,
        selection: opt.Selection = "first",
        seed: opt.Seed = 0,
        disjoint: opt.Disjoint = False,
        source: Path | None = None,
        out: opt.Out = None,
        cache: opt.Cache = None,
        workers: opt.Workers = None,
        format: opt.Format = [],  # noqa: A002, B006 - the option's name
        shard_images: opt.ShardImages = None,
        force: opt.Force = False,
        on_bad_image: opt.OnBad = "error",
    ) -> None:
        split = {"n1": n1, "m1": m1, "gamma_l": gamma_l, "gamma_u": gamma_u, "resolution": res}
        draw = {"selection": selection, "seed": seed, "disjoint": disjoint}
        run = {"source": source, "cache": cache, "workers": workers, "force": force, "on_bad_image": on_bad_image}
        _build(name, out, format, **split, **draw, **run, shard_images=shard_images)

    forms = f"The raw data: {entry.forms}." if entry.forms else f"Not taken: {entry.origin}."
    command.__annotations__["source"] = Annotated[Path | None, opt.build_option(help=forms)]
    text = f"{entry.summary}: {entry.source}.\n\nDefaults: {entry.usual_split}."
    app.command(name, help=text, rich_help_panel="Data sets")(command)


for _name, _entry in CATALOG.items():
    if _entry.defaults is not None:
        _long_tail_command(_name)


@app.command("folder", rich_help_panel="Data sets")
def folder_command(
    res: Annotated[int, typer.Option(help="Side of the stored images, in pixels.")],
    labeled: Annotated[
        Path | None, typer.Option(help="Labeled images: a folder of class folders (or a zip, tar, a.zip/inner).")
    ] = None,
    unlabeled: Annotated[Path | None, typer.Option(help="Unlabeled images, anywhere below this folder.")] = None,
    test: Annotated[Path | None, typer.Option(help="Test images in class folders of the same names.")] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --labeled and --test: a list of images with columns path, label, split (train, "
            "validation, test)."
        ),
    ] = None,
    test_fraction: Annotated[
        float | None, opt.split_option(help="Instead of --test: the share of each class's labeled images to hold out.")
    ] = None,
    validation_fraction: Annotated[
        float | None,
        opt.split_option(help="The share of each class's labeled images by which the best checkpoint is chosen."),
    ] = None,
    seed: Annotated[int, opt.split_option(help="Seed of --test-fraction and --validation-fraction.")] = 0,
    disjoint: opt.Disjoint = False,
    fit: Annotated[
        str, typer.Option(help="squash to a square, crop the middle, or pad with the mean color.")
    ] = "squash",
    filter: Annotated[  # noqa: A002 - the option's name
        str, typer.Option(help="Pillow's filter to resize by: box, bilinear, bicubic or lanczos.")
    ] = "box",
    exif: Annotated[str, typer.Option(help="Turn images as their EXIF data ask (apply), or not (stored).")] = "apply",
    out: opt.Out = None,
    workers: opt.Workers = None,
    format: opt.Format = [],  # noqa: A002, B006 - the option's name
    shard_images: opt.ShardImages = None,
    force: opt.Force = False,
    on_bad_image: opt.OnBad = "error",
    allow_overlap: opt.AllowOverlap = False,
) -> None:
    """Your own images: class folders for labeled and test and any tree for unlabeled, or a CSV file."""
    inputs = {"labeled": labeled, "unlabeled": unlabeled, "test": test, "csv": csv}
    split = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    split |= {"seed": seed, "disjoint": disjoint}
    rule = {"resolution": res, "fit": fit, "filter_name": filter, "exif": exif}
    run = {"workers": workers, "force": force, "on_bad_image": on_bad_image, "allow_overlap": allow_overlap}
    _build("folder", out, format, **inputs, **split, **rule, **run, shard_images=shard_images)


@app.command("imagenet127", rich_help_panel="Data sets")
def imagenet127_command(
    res: Annotated[int, opt.split_option(help="Side of the stored images, in pixels.")] = 64,
    labeled_fraction: Annotated[float, opt.split_option(help="Labeled share of each class.")] = 0.1,
    selection: opt.Selection = "random",
    seed: opt.Seed = 0,
    disjoint: opt.Disjoint = False,
    source: Annotated[Path | None, opt.build_option(help=f"{IMAGENET_FORMS}. Default: {IMAGENET_FOLDERS}, ...")] = None,
    val_labels: Annotated[
        Path | None, opt.build_option(help="Labels of a flat val/: devkit archive, or a file of lines 'image wnid'.")
    ] = None,
    test_from_train: Annotated[
        bool, opt.build_option("--test-from-train", help="Without val images: test on the training ones (to try out).")
    ] = False,
    verify: Annotated[bool, opt.build_option("--verify", help="Check the official tars' MD5 first (144 GB).")] = False,
    out: opt.Out = None,
    cache: opt.Cache = None,
    workers: opt.Workers = None,
    format: opt.Format = [],  # noqa: A002, B006 - the option's name
    shard_images: opt.ShardImages = None,
    force: opt.Force = False,
    on_bad_image: opt.OnBad = "error",
) -> None:
    """ImageNet in 127 superclasses, resized to --res by Pillow's box filter; 10% of each class labeled."""
    split = {"resolution": res, "labeled_fraction": labeled_fraction, "selection": selection, "seed": seed}
    more = {"disjoint": disjoint, "val_labels": val_labels, "test_from_train": test_from_train, "verify": verify}
    run = {"source": source, "cache": cache, "workers": workers, "force": force, "on_bad_image": on_bad_image}
    _build("imagenet127", out, format, **split, **more, **run, shard_images=shard_images)


@app.command("list", rich_help_panel="What there is")
def list_command() -> None:
    """What can be built."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "what", "default split", "source"):
        table.add_column(heading, overflow="fold")
    for name, entry in CATALOG.items():
        table.add_row(f"[bold]{name}[/]", entry.summary, entry.usual_split, entry.source)
    console = Console()
    console.print(table)
    console.print(f"\nBuild one: {PROGRAM} NAME [--help]", highlight=False, markup=False)


@app.command("info", rich_help_panel="What there is")
def info_command(folder: Annotated[Path, typer.Argument(help="A data folder.")]) -> None:
    """What a data folder holds."""
    from data_prep.folder.show import show_folder

    show_folder(_at_home(folder))


@app.command("verify", rich_help_panel="What there is")
def verify_command(folder: Annotated[Path, typer.Argument(help="A data folder.")]) -> None:
    """Read every file of a data folder again, and compare it with the manifest's checksums."""
    from data_prep.folder.verify import verify_folder

    verify_folder(_at_home(folder))


def _interrupt(*_: object) -> None:
    raise Interrupted


def main() -> int:
    """Run the command line. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return app(standalone_mode=False) or 0
    except UserError as error:
        _remark(f"error: {error}")
    except USAGE_ERROR as error:
        _remark(f"error: {' '.join(error.format_message().split())}")  # type: ignore[attr-defined]
    except Interrupted:
        _remark(INTERRUPTED)
        return 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 2
