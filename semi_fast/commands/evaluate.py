"""Every figure of a checkpoint, as a table or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import UserError
from pipelines.arrays import Arrays, open_arrays
from pipelines.reading import batches, read_facts
from semi_fast.run.saved import Step, Trained, Weights, load_trained
from semi_fast.run.summary import logged_name
from semi_fast.training.evaluate import Metrics, evaluate


def evaluate_run(run: Path, data: Path | None, *, step: Step, as_json: bool) -> None:
    """The command: measure a checkpoint and print every figure. data, step: see `load_trained`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Metrics] = {}
    for weights in get_args(Weights):
        trained = load_trained(run, weights=weights, step=step, data=data, device=device)
        arrays = fitting_arrays(trained, data)
        measured = evaluate(trained.method, plain_batches(arrays, device), trained.facts.info.labeled_counts)
        figures |= {logged_name(head, weights): metrics for head, metrics in measured.items()}
    facts = read_facts(arrays.folder)
    for name in ("fit", "resize_filter", "exif"):
        made, needed = getattr(facts, name), getattr(trained.facts, name)
        if made != needed:
            print(f"note: {arrays.folder} was made with {name} {made}, the run's data with {needed}.", file=sys.stderr)
    if as_json:
        print(json.dumps(as_values(trained, arrays, figures), indent=1))
    else:
        show(trained, arrays, figures)


def fitting_arrays(trained: Trained, data: Path | None) -> Arrays:
    """The data to evaluate on. Raises: UserError when it does not fit the model, or has no test images."""
    arrays = open_arrays(data or trained.settings.data.path)
    info, known = arrays.info, trained.facts.info
    if info.class_names != known.class_names:
        names, needed = (", ".join(facts.class_names[:3]) for facts in (info, known))
        raise UserError(f"{arrays.folder} has other classes ({names}, ...) than the run ({needed}, ...).")
    if info.resolution != known.resolution:
        sizes = f"images of {info.resolution} px, the run was trained on {known.resolution} px"
        raise UserError(f"{arrays.folder} has {sizes}.")
    if not info.num_test:
        raise UserError(f"{arrays.folder} has no test images: there is nothing to measure accuracy on.")
    # Normalized as in training, whatever the mean of these images is.
    return arrays._replace(info=info._replace(mean=known.mean, std=known.std))


def plain_batches(arrays: Arrays, device: str, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images once, in order, normalized: x (n, 3, H, W), y (n,)."""
    labels = torch.from_numpy(arrays.test_labels).to(device)
    images = batches(arrays.test, np.arange(len(labels)), arrays.info, device, size)
    return zip(images, labels.split(size), strict=True)


def as_values(trained: Trained, arrays: Arrays, figures: dict[str, Metrics]) -> dict[str, Any]:
    """All figures as JSON values, by weights and head."""
    names = arrays.info.class_names
    return {
        "data": arrays.info.name,
        "data_fingerprint": arrays.info.fingerprint,
        "method": trained.settings.method.name,
        "reported": logged_name(trained.method.reported, trained.method.weights),
        "step": trained.step,
        "test_images": arrays.info.num_test,
        "figures": {
            name: {
                **m._asdict(),
                "per_class": dict(zip(names, m.per_class, strict=True)),
                "confusion": m.confusion.tolist(),
            }
            for name, m in figures.items()
        },
    }


def show(trained: Trained, arrays: Arrays, figures: dict[str, Metrics]) -> None:
    """Print the figures as tables: a line a head, then a line a class."""
    info, first = arrays.info, next(iter(figures.values()))
    totals, labeled = first.confusion.sum(1), trained.facts.info.labeled_counts
    heads = [("weights/head", "accuracy", "balanced", *first.groups)]
    heads += [
        (name, *(f"{v:.2f}" for v in (m.accuracy, m.balanced, *m.groups.values()))) for name, m in figures.items()
    ]
    classes = [("class", "labeled", "test", *figures)]
    for k, name in enumerate(info.class_names):
        cells = ("–" if (value := m.per_class[k]) is None else f"{value:.1f}" for m in figures.values())
        classes.append((name, f"{labeled[k]:,}", f"{totals[k]:,}", *cells))
    print(f"{trained.settings.method.name}, step {trained.step:,}, on {info.num_test:,} test images of {info.name}")
    for table in (heads, classes):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for name, *numbers in table:
            print(name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), sep="  ")
        print()
