"""All that is known of one run: what its folder holds, and what its model makes of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from pipelines import Info
from pipelines.arrays import Arrays, open_arrays
from pipelines.reading import DataFacts, batches
from semi_fast.config import flatten, read_run_config
from semi_fast.memory_bank import MemoryBank
from semi_fast.methods import method_class, method_names
from semi_fast.parts.figures import Figure
from semi_fast.reporting.paper import PaperFigure, beside_paper, paper_figure, paper_figures
from semi_fast.reporting.runlog import RunLog, read_log, series
from semi_fast.run.saved import Step, Trained, load_trained, run_facts
from semi_fast.run.summary import LAST, LOGGED_AS, SUMMARY, Summary, best_of, closing_figures, read_summary, score

MOST_TEST, MOST_UNLABELED = 10_000, 5_000  # images looked at; on a CPU a pass over more would take minutes


class Predictions(NamedTuple):
    """A model's view of images.

    rows: (n,) int64, which images. classes, confidences: (n,) by head, the reported head first: the class predicted and
    its probability in [0, 1]. labels: (n,) int64, -1 where unknown. features: (n, d) float32. total: images there were
    to choose from.
    """

    rows: NDArray[np.int64]
    classes: dict[str, NDArray[np.int64]]
    confidences: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    features: NDArray[np.float32]
    total: int

    @property
    def heads(self) -> list[str]:
        """Names of the heads, the reported one first."""
        return list(self.classes)


@dataclass
class RunData:
    """One run. What could not be had is None, and a sentence in `notes` or under `why` says why.

    config: settings as plain values, {} where unreadable. summary: of a finished run. why: reason by what is missing
    ("model", "data"). test, unlabeled, bank: what the model makes of the images, and rows and confidences in
    its memory bank. chosen: step of the checkpoint that was asked for; None: none in particular.
    """

    folder: Path
    config: dict[str, Any]
    log: RunLog
    summary: Summary | None
    facts: DataFacts | None = None
    trained: Trained | None = None
    arrays: Arrays | None = None
    test: Predictions | None = None
    unlabeled: Predictions | None = None
    bank: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    notes: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)
    chosen: int | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def info(self) -> Info | None:
        """The facts about the data set, as far as they are known."""
        return self.facts.info if self.facts else None

    @property
    def method(self) -> str:
        """The method's name; "?" where the settings cannot be read."""
        return str(self.get("method.name", "?"))

    @property
    def options(self) -> dict[str, Any]:
        """The method's options."""
        return {key: value for key, value in (self.get("method") or {}).items() if key != "name"}

    @property
    def declared(self) -> tuple[Figure, ...]:
        """The figures that the method declares; none for a method that this version does not have."""
        return method_class(self.method).figures if self.method in method_names() else ()

    @property
    def settings(self) -> dict[str, str]:
        """Every setting in dotted form, as text."""
        return {key: "none" if value is None else str(value) for key, value in flatten(self.config).items()}

    @property
    def paper(self) -> PaperFigure | None:
        """The paper's figure for this method on this data set."""
        f = self.facts if self.papers else None
        return f and paper_figure(f.split, f.info.resolution, self.method, self.options)

    @property
    def papers(self) -> list[PaperFigure]:
        """The paper's figures that may stand beside this run's."""
        f = self.facts if beside_paper(self.get("protocol", "")) else None
        return paper_figures(f.split, f.info.resolution) if f else []

    def get(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @cached_property
    def closing(self) -> Summary | None:
        """What came out of the run; of one that is not finished, so far. None before the first evaluation."""
        return self.summary or _so_far(self)

    @property
    def order(self) -> list[int]:
        """Classes from the one with the most labeled images to the one with the fewest."""
        counts = self.info.labeled_counts if self.info else ()
        return sorted(range(len(counts)), key=lambda k: -counts[k])

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, fit for a drawing: no control characters, not longer than 18 letters."""
        return [label(name) for name in self.info.class_names] if self.info else []

    @property
    def has_test_labels(self) -> bool:
        """Whether there is anything to measure accuracy on."""
        return self.info is None or self.info.num_test > 0

    def confusion(self) -> NDArray[np.int64] | None:
        """(K, K), rows true, of the reported head after the last step, or of the checkpoint that was asked for."""
        if self.summary and self.chosen is None:
            return np.asarray(self.summary.confusion, np.int64)
        if self.test is None or self.info is None:
            return None
        return confusion_of(self.test.labels, self.test.classes[self.test.heads[0]], self.info.num_classes)


def confusion_of(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts (K, K) of true class (rows) and predicted class; unknown labels (-1) are left out."""
    known = labels >= 0
    cells = np.bincount(labels[known] * classes + predicted[known], minlength=classes * classes)
    return cells.reshape(classes, classes)


def label(name: str, most: int = 18) -> str:
    """A class name fit for a drawing."""
    clean = "".join(letter if letter.isprintable() else " " for letter in name).strip() or "(no name)"
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def gather_run(folder: Path, *, look: bool = True, data: Path | None = None, step: Step = None) -> RunData:
    """Everything about the run in a folder.

    Args:
        folder: the run's folder, finished or not.
        look: whether to run the model over the data for confusion, embeddings and pictures.
        data: the data folder; None: the one of the settings.
        step: of the checkpoint; "best", or None: the newest.

    Raises: UserError when the folder is no run at all (neither settings nor log), or has no checkpoint of that step.
    """
    if not (folder / "log.jsonl").exists() and not (folder / "checkpoints").is_dir():
        read_run_config(folder)
    notes: list[str] = []

    def attempt(what: str, read: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return read()
        except UserError as error:
            notes.append(f"{what}: {error}")
            return otherwise

    config = attempt("The settings are missing", lambda: read_run_config(folder), {})
    summary = attempt("The closing figures are missing", lambda: read_summary(folder))
    run = RunData(folder, config, read_log(folder / "log.jsonl"), summary, notes=notes)
    if not (folder / SUMMARY).exists():
        notes.append(_not_finished(run))
    notes += run.log.problems
    place = data or run.get("data.path", "")
    run.facts = attempt("What is known of the data is missing", lambda: run_facts(folder, place))
    if look:
        _look(run, data, step)
    return run


def _so_far(run: RunData) -> Summary | None:
    """What the summary would say, as far as the log goes."""
    measured = [entry for entry in run.log.evaluations if np.isfinite(series([entry], "eval/accuracy")[1]).any()]
    if not measured:
        return None
    newest, figures, best = run.log.evaluations[-1], closing_figures(measured), max(measured, key=score)
    reported = f"eval/{run.log.reported}/"
    figure = run.get("figure") if run.get("figure") in figures else "last"
    weights, _, head = run.log.reported.partition("/")
    rates = series(run.log.train, "throughput/images_per_s")[1]
    stamps = series(run.log.train, "time")[1]
    return Summary(
        data=run.info.name if run.info else "?",
        method=run.method,
        protocol=run.get("protocol", ""),
        seed=run.get("seed", 0),
        accuracy=figures[figure],
        figure=figure,
        head=head,
        weights=next((name for name, logged in LOGGED_AS.items() if logged == weights), weights),
        figures=figures,
        evaluations_in_mean=min(LAST, len(measured)),
        balanced=newest.get(f"{reported}balanced", np.nan),
        groups={name: newest[reported + name] for name in ("many", "medium", "few") if reported + name in newest},
        steps=run.log.last_step,
        seconds=float(stamps[-1] - stamps[0]) if len(stamps) else 0.0,
        images_per_s=float(np.nanmedian(rates)) if np.isfinite(rates).any() else 0.0,
        **best_of(best),
    )


def _not_finished(run: RunData) -> str:
    steps = run.get("steps")
    done = f"{run.log.last_step:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")
    path = run.folder / "log.jsonl"
    when = f"; its log was last written {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}" * path.exists()
    return f"This run is not finished: {done} steps are logged{when}. The report shows what there is."


def _look(run: RunData, data: Path | None, step: Step) -> None:
    """Load a checkpoint and the data, and run the one over the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        run.trained = load_trained(run.folder, step=step, data=data, device=device)
    except UserError as error:
        if step is not None:
            raise
        run.why["model"] = str(error)
    else:
        if step is not None:
            run.chosen = run.trained.step
            run.notes.append(
                f"Confusion, accuracy of the classes, embeddings and pictures are those of step {run.chosen:,}; "
                "curves and closing figures are those of the whole run."
            )
    try:
        arrays = open_arrays(data or run.get("data.path", ""))
        if run.info is not None and arrays.info.fingerprint != run.info.fingerprint:
            raise UserError(f"{arrays.folder} does not hold the data of the run (its fingerprint differs).")
        run.arrays = arrays
    except UserError as error:
        run.why["data"] = str(error)
        run.notes.append(
            f"Pictures and embeddings need the data: {error} Where it has moved, name its folder by --data."
        )
    if run.trained is not None and run.arrays is not None:
        tested, train, labels = np.arange(len(arrays.test_labels)), arrays.train, arrays.train_labels
        run.test = predictions(run.trained, arrays.test, arrays.test_labels, tested, MOST_TEST, device)
        run.unlabeled = predictions(run.trained, train, labels, arrays.unlabeled_rows, MOST_UNLABELED, device)
        run.bank = bank_of(run.trained)


def sample(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the rows, the same ones every time, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


def predictions(
    trained: Trained,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    most: int,
    device: torch.device | str,
) -> Predictions | None:
    """Run the model over these rows of the images, or a sample of `most` of them; None where there are none.

    Args:
        images: (N, H, W, 3). labels: (N,), -1 where unknown. rows: (n,).
    """
    if not len(rows):
        return None
    chosen = sample(rows, most)
    features: list[Tensor] = []
    logits: dict[str, list[Tensor]] = {}
    hook = trained.method.net.register_forward_hook(lambda _, __, output: features.append(output.float().cpu()))
    try:
        for x in batches(images, chosen, trained.facts.info, device):
            for head, values in trained.logits(x).items():
                logits.setdefault(head, []).append(values.float().cpu())
    finally:
        hook.remove()
    best = {head: torch.cat(parts).softmax(1).max(1) for head, parts in logits.items()}
    return Predictions(
        chosen,
        {head: b.indices.numpy() for head, b in best.items()},
        {head: b.values.numpy() for head, b in best.items()},
        labels[chosen],
        torch.cat(features).numpy(),
        len(rows),
    )


def bank_of(trained: Trained) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Rows of train.npy and confidences in the method's memory bank, (K, S) each, -1 and 0 where empty; None: none."""
    banks = (part for part in trained.method.modules() if isinstance(part, MemoryBank))
    return next(((bank.rows.cpu().numpy(), bank.confidences.cpu().numpy()) for bank in banks), None)
