"""Everything beside training: `python -m semi_fast COMMAND`. Each command imports what it needs, and only then."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from data_prep.errors import UserError

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, wherever this typer keeps its click
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What comes beside training, which is: accelerate launch semi_fast/train.py",
)
Run = Annotated[Path, typer.Argument(help="The run's folder.")]
Data = Annotated[Path | None, typer.Option(help="Data folder. Default: the one the run was trained on.")]
Step = Annotated[
    str | None,
    typer.Option(
        help="Step of the checkpoint, or best: of the highest validation (without validation images: test) accuracy. "
        "Default: the newest."
    ),
]
Weights = Annotated[str | None, typer.Option(help="averaged or raw. Default: those that the method reports.")]


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not. Several: a comparison.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file. Default: report.html in the run, comparison.html beside the first."),
    ] = None,
    data: Data = None,
    step: Step = None,
    to_label: Annotated[
        int | None, typer.Option(min=1, help="Images of each class in to_label.csv, what to label next. Default: 10.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write the report of a run, or the comparison of several, as one HTML file that needs no network."""
    from semi_fast.reporting import write_report
    from semi_fast.run.saved import step_named

    path = write_report(runs, out, data=data, step=step_named(step), to_label=to_label)
    print(path)
    if open_it:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            print(f"no browser could be started; open {path.resolve()}", file=sys.stderr)


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, zip or tar archives.")],
    out: Annotated[Path | None, typer.Option(help="A .csv or .json file. Default: CSV on stdout.")] = None,
    weights: Weights = None,
    step: Step = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
) -> int:
    """Class, confidence and the five likeliest classes of images. Unreadable files are listed; exit code 1."""
    from semi_fast.commands.predict import predict
    from semi_fast.run.saved import step_named, weights_named

    return predict(run, images, out, weights=weights_named(weights), step=step_named(step), batch=batch)


@app.command()
def export(
    run: Run,
    onnx: Annotated[Path, typer.Option(help="The file to write.")],
    weights: Weights = None,
    step: Step = None,
) -> None:
    """Write a run's model as ONNX, and compare it with torch by onnxruntime before it gets its name."""
    from semi_fast.commands.export import export
    from semi_fast.run.saved import step_named, weights_named

    export(run, onnx, weights=weights_named(weights), step=step_named(step))


@app.command()
def evaluate(
    run: Run,
    data: Data = None,
    step: Step = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Accuracies of a checkpoint: all, balanced, by class group and class; of every head, averaged and raw weights."""
    from semi_fast.commands.evaluate import evaluate_run
    from semi_fast.run.saved import step_named

    evaluate_run(run, data, step=step_named(step), as_json=as_json)


@app.command()
def dashboard(
    project: Annotated[str, typer.Option(help="The W&B project, as in wandb_project=.")],
    entity: Annotated[str, typer.Option(help="User or team. Default: that of whoever is logged in.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print it as JSON; needs neither network nor key.")
    ] = False,
) -> None:
    """Create the W&B workspace of a project, or update the one created before."""
    from semi_fast.commands.dashboard import dashboard

    dashboard(project, entity, dry_run)


@app.command()
def sweep(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG ...] [key=value ...]", help="As for training, for every run.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas. Default: all.")] = None,
    seeds: Annotated[str, typer.Option(help="Whole numbers, separated by commas.")] = "0,1,2",
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: sweeps/<data>.")] = None,
    devices: Annotated[str, typer.Option(help="auto: every GPU, else the CPU; cpu; or GPUs such as 0,2.")] = "auto",
) -> int:
    """Train every method with every seed, and write one table beside the paper's figures.

    A run is a process of its own: one after another, or one a GPU where the machine has several. The same command goes
    on where it stood: finished runs are kept, unfinished ones go on from their newest checkpoint. A run that fails does
    not end the others.
    """
    from semi_fast.commands.sweep import sweep

    return sweep(settings or [], methods, seeds, out, devices)


@app.command()
def table(
    which: Annotated[str, typer.Argument(help="1, 2, 3, 4 or 5, or figures: the paper's Figures 3 to 6.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG ...] [key=value ...]", help="For every run, above the row's.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of data folders; what is missing there is built.")] = Path("data"),
    source: Annotated[list[str] | None, typer.Option(help="NAME=PATH of raw data, where it is not downloaded.")] = None,
    seeds: Annotated[str, typer.Option(help="Whole numbers, separated by commas.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(min=1, help="Of every run. Default: the protocol's.")] = None,
    cells: Annotated[
        str | None,
        typer.Option(help='Data sets by words of their names: "cifar10-lt n500 u100, stl10-lt". Default: all.'),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods or rows, separated by commas. Default: the rows of the paper.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="Settings file of the protocol of all rows.")] = None,
    planned: Annotated[bool, typer.Option("--plan", help="Print commands and hours; train nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the tables and of their runs.")] = Path("tables"),
    devices: Annotated[str, typer.Option(help="auto: every GPU, else the CPU; cpu; or GPUs such as 0,2.")] = "auto",
) -> int:
    """Train the rows of a table of the paper, and write it with our figures beside the published ones.

    The same command goes on where it stood, as that of a sweep; tables share their runs.
    """
    from semi_fast.commands import table
    from semi_fast.commands.sweep import seed_list

    given = [*(settings or []), *([f"steps={steps}"] if steps else [])]
    choice = table.Choice(which, given, data, out, seed_list(seeds), cells, methods, protocol, source or [])
    if which == "figures":
        unused = {"--plan": planned, "--steps": steps, "--protocol": protocol, "--source": source}
        unused |= {"--devices": devices != "auto", "further settings": settings}
        if found := [option for option, value in unused.items() if value]:
            verb = "is" if len(found) == 1 and found[0].startswith("--") else "are"
            raise UserError(f"{', '.join(found)} {verb} for tables. The figures are drawn of runs that are finished.")
        return table.figures(choice)
    return table.table(choice, planned=planned, devices=devices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0, 2 with one line for a user's mistake, 130 when interrupted.

    Args:
        argv: command and arguments; None: those of the process.
    """
    try:
        return app(args=None if argv is None else list(argv), prog_name="semi_fast", standalone_mode=False) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except USAGE_ERROR as error:
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
