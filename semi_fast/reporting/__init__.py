"""Reports of runs as self-contained pages: `write_report` and `report_at_end` are the whole public surface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.errors import UserError
from semi_fast.run.saved import Step

__all__ = ["report_at_end", "write_report"]

REPORT, CURVES = "report.html", "curves.png"
WORTH = 100  # steps from which report=auto writes a report


def write_report(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    data: Path | None = None,
    step: Step = None,
    to_label: int | None = None,
) -> Path:
    """Write the report of one run, or the comparison of several, and its figures beside it.

    Beside that of one run lies to_label.csv, which lists the images to label next.

    Args:
        folders: of the runs, finished or not.
        out: the HTML file; None: report.html in the run's folder, or comparison.html beside the first run's.
        data: the data folder of a single run; None: the one that it was trained on.
        step: of the checkpoint whose model a single run's report shows; "best", or None: the newest.
        to_label: images of each class in to_label.csv, 1 or more; None: 10.

    Returns: the HTML file.
    Raises: UserError when a folder is no run, has no checkpoint of that step, or the file cannot be written.
    """
    # matplotlib, scikit-learn and Jinja take a second to import.
    from semi_fast.reporting.comparison import write_comparison
    from semi_fast.reporting.rundata import gather_run
    from semi_fast.reporting.single import write_single
    from semi_fast.reporting.to_label import EACH

    if not folders:
        raise UserError("A report needs at least one run's folder.")
    alone = len(folders) == 1
    if not alone and any(option is not None for option in (data, step, to_label)):
        raise UserError("--data, --step and --to-label are for the report of a single run: a comparison runs no model.")
    path = out or (folders[0] / REPORT if alone else folders[0].resolve().parent / "comparison.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"A report is an .html file, got {path}. Name it {path.name}.html.")
    runs = [gather_run(folder, look=alone, data=data, step=step) for folder in folders]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_single(runs[0], path, to_label or EACH) if alone else write_comparison(runs, path)
    except OSError as error:
        raise UserError(f"The report cannot be written to {path}: {error.strerror or error}.") from None


def report_at_end(folder: Path, mode: str, steps: int, say: Callable[[str], None]) -> None:
    """Draw curves.png and write the report of a run that has just ended. What fails is said in one line: it is done.

    Args:
        folder: the run's. mode: of the report, "on", "off", or "auto": for runs of `WORTH` steps or more.
        steps: of the run. say: takes the line about where the report is, or why there is none.
    """
    try:
        draw_curves(folder)
        if mode == "on" or (mode == "auto" and steps >= WORTH):
            say(f"report: {write_report([folder])}")
    except Exception as error:  # whatever it is, a finished run must not end as a failed one
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"warning: no report ({type(error).__name__}: {reason}). Try again: python -m semi_fast report {folder}")


def draw_curves(folder: Path) -> None:
    """Draw curves.png, the report's figure of the accuracies, into a run's folder; nothing before an evaluation."""
    from semi_fast.reporting.curves_over_time import accuracy_figures
    from semi_fast.reporting.runlog import read_log

    log = read_log(folder / "log.jsonl")
    drawn = accuracy_figures(log.evaluations, log.reported)[0]
    if drawn is not None:
        (folder / CURVES).write_bytes(drawn.files["png"])
