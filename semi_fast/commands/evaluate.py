"""What `python -m semi_fast evaluate runs/NAME [--data DIR]` does: every figure of a checkpoint, as a table or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from data_prep.errors import UserError
from pipelines.arrays import Arrays, open_arrays
from semi_fast.commands.run_command import run_command
from semi_fast.run.inputs import batches
from semi_fast.run.saved import STEP_HELP, Trained, Weights, load_trained, step_named
from semi_fast.training.evaluate import Metrics, evaluate

app = typer.Typer(add_completion=False)


@app.command()
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    data: Annotated[Path | None, typer.Option(help="Data folder. Default: the one the run was trained on.")] = None,
    step: Annotated[str | None, typer.Option(help=STEP_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Accuracies of a checkpoint: all, balanced, by class group and class; of both heads, EMA and raw weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Metrics] = {}
    kinds: tuple[Weights, ...] = ("ema", "raw")
    for kind in kinds:
        trained = load_trained(run, weights=kind, step=step_named(step), data=data, device=device)
        arrays = fitting_arrays(trained, data)
        counts = trained.facts.info.labeled_counts
        measured = evaluate(trained.method, plain_batches(arrays, trained, device), counts)
        figures |= {f"{kind}/{head}": metrics for head, metrics in measured.items()}
    if as_json:
        print(json.dumps(as_values(trained, arrays, figures), indent=1))
    else:
        show(trained, arrays, figures)


def fitting_arrays(trained: Trained, data: Path | None) -> Arrays:
    """The data to evaluate on. Raises: UserError when it does not fit the model, or has no test images."""
    arrays = open_arrays(data or trained.settings.data.path)
    info, own = arrays.info, trained.facts.info
    if info.class_names != own.class_names:
        theirs, ours = _few(info.class_names), _few(own.class_names)
        raise UserError(f"{arrays.folder} has other classes ({theirs}) than the run ({ours}).")
    if info.resolution != own.resolution:
        sizes = f"images of {info.resolution} px, the run was trained on {own.resolution} px"
        raise UserError(f"{arrays.folder} has {sizes}.")
    if not info.num_test:
        raise UserError(f"{arrays.folder} has no test images: there is nothing to measure accuracy on.")
    return arrays


def plain_batches(arrays: Arrays, trained: Trained, device: str, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images once, in order, normalized as in training: x (n, 3, H, W), y (n,)."""
    labels = torch.from_numpy(arrays.test_labels).to(device)
    images = batches(arrays.test, range(len(labels)), trained.facts.info, device, size)
    return zip(images, labels.split(size), strict=True)


def as_values(trained: Trained, arrays: Arrays, figures: dict[str, Metrics]) -> dict[str, Any]:
    """All figures as JSON values, by weights and head."""
    names = arrays.info.class_names
    return {
        "data": arrays.info.name,
        "data_fingerprint": arrays.info.fingerprint,
        "method": trained.settings.method.name,
        "step": trained.step,
        "test_images": arrays.info.num_test,
        "figures": {
            name: {
                "accuracy": m.accuracy,
                "balanced": m.balanced,
                "groups": m.groups,
                "per_class": dict(zip(names, m.per_class, strict=True)),
                "confusion": m.confusion.tolist(),
            }
            for name, m in figures.items()
        },
    }


def show(trained: Trained, arrays: Arrays, figures: dict[str, Metrics]) -> None:
    """Print the figures as tables: a line a head, then a line a class."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    info = arrays.info
    console = Console(highlight=False)
    console.print(
        Text(f"{trained.settings.method.name}, step {trained.step:,}, on {info.num_test:,} test images of {info.name}")
    )
    heads = Table(box=None, pad_edge=False, header_style="bold")
    heads.add_column("weights/head")
    groups = list(next(iter(figures.values())).groups)
    for heading in ("accuracy", "balanced", *groups):
        heads.add_column(heading, justify="right")
    for name, m in figures.items():
        heads.add_row(name, *(f"{value:.2f}" for value in (m.accuracy, m.balanced, *(m.groups[g] for g in groups))))
    console.print(heads)
    console.print()
    classes = Table(box=None, pad_edge=False, header_style="bold")
    classes.add_column("class", overflow="fold")
    for heading in ("labeled", "test", *figures):
        classes.add_column(heading, justify="right")
    totals = next(iter(figures.values())).confusion.sum(1)
    for k, name in enumerate(info.class_names):
        cells = ["–" if (value := m.per_class[k]) is None else f"{value:.1f}" for m in figures.values()]
        classes.add_row(Text(name), f"{trained.facts.info.labeled_counts[k]:,}", f"{totals[k]:,}", *cells)
    console.print(classes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 for a user's mistake."""
    return run_command(app, argv)


if __name__ == "__main__":
    sys.exit(main())
