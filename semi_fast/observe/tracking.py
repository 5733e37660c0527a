"""A run at Weights & Biases: figures, tables and the report, beside its folder; trouble there ends the record alone."""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec
from urllib.parse import urlsplit

import numpy as np

from data_prep.files import replacing
from pipelines import Info
from semi_fast.training.evaluate import class_groups

ID = "wandb-id"  # in a run's folder: the id of its run at W&B, the same in every session
CONNECT_SECONDS = 2.0
INIT_SECONDS = 5.0
WRITE_SECONDS = 0.2  # between two writes of an offline run: what a killed process loses of it
FINISH_SECONDS = 120.0  # for what is still to be uploaded at the end; the rest stays in the run's folder
STEP = "step"  # the x-axis of every figure
PER_CLASS, CONFUSION = "per_class", "confusion"  # keys of the two tables
MATRIX = ("Actual", "Predicted", "nPredictions")  # columns of the second
BEST = {"eval/*": "max", "pseudo/accuracy*": "max", "loss/total": "min", "pseudo/class_gap": "min"}  # kept, too
FILES = ("report.html", "curves.png", "summary.json", "config.yaml")  # of the run's folder, those that exist
MOST_BINS = 512  # of a histogram at W&B
MOST_CELLS = 10_000  # of a table that W&B draws a chart from


Given = ParamSpec("Given")


def survived(act: Callable[Concatenate[Tracker, Given], None]) -> Callable[Concatenate[Tracker, Given], None]:
    """A method of a tracker that does nothing without a run, and whose first error is said and ends the record."""

    @wraps(act)
    def tried(tracker: Tracker, *args: Given.args, **named: Given.kwargs) -> None:
        if tracker._run is None:
            return
        try:
            act(tracker, *args, **named)
        except Exception as error:  # whatever it is: training matters more than its record
            tracker._run = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            tracker._say(f"warning: W&B failed and records nothing more ({reason}); log.jsonl goes on.")

    return tried


class Tracker:
    """Records figures at W&B. Whatever W&B raises is said once; the run then goes on without it.

    Args:
        run: what `wandb.init` returned; None: nothing is recorded (`wandb=off`, and every process but the first).
        say: takes one line about trouble.
        logged: the last step that is there already; a run that goes on comes by those since its checkpoint again.
    """

    def __init__(self, run: Any, say: Callable[[str], None], logged: int = 0) -> None:
        self._run, self._say, self._logged = run, say, logged
        self._defined: set[str] = set()

    @survived
    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record all figures of a step, which is later than any before; one number a class becomes a histogram."""
        if step <= self._logged:
            return
        if not self._defined:
            self._run.define_metric(STEP, hidden=True)
        for name in data.keys() - self._defined:
            self._defined.add(name)
            kept = [*(extreme for pattern, extreme in BEST.items() if fnmatchcase(name, pattern)), "last"]
            summary = "none" if isinstance(data[name], list) else ",".join(kept)
            self._run.define_metric(name, step_metric=STEP, summary=summary)
        shown = {name: _histogram(value) if isinstance(value, list) else value for name, value in data.items()}
        # W&B's own step is the run's, too: a row it has already is then never added a second time.
        row = {STEP: step, **{name: value for name, value in shown.items() if value is not None}}
        self._run.log(row, step=step, commit=True)

    @survived
    def publish(self, summary: dict[str, Any], info: Info, unlabeled: Sequence[int] | None, folder: Path) -> None:
        """Record what came out: the closing figures, accuracy by class, the confusion matrix, the report's files.

        Args:
            summary: what summary.json holds.
            unlabeled: (K) unlabeled images a class; None where their classes are unknown.
            folder: the run's.
        """
        import wandb

        numbers = {name: value for name, value in summary.items() if isinstance(value, (int, float))}
        self._run.summary.update(numbers)
        rows = confusion_rows(summary["confusion"], info.class_names)
        table = wandb.Table(columns=list(MATRIX), data=rows)
        fields = {name: name for name in MATRIX}
        chart = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Confusion matrix"})
        # W&B keeps the table of a chart under the chart's key and "_table".
        confusion = {CONFUSION: chart} if len(rows) <= MOST_CELLS else {f"{CONFUSION}_table": table}
        by_class = per_class_table(summary["per_class"], info, unlabeled)
        self._run.log({PER_CLASS: by_class, **confusion}, step=summary["steps"] + 1, commit=True)
        artifact = wandb.Artifact(f"{self._run.id}-report", type="report", description=f"Results of {folder.name}")
        for name in FILES:
            if (folder / name).exists():
                artifact.add_file(str(folder / name))
        self._run.log_artifact(artifact)

    @survived
    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


def per_class_table(accuracies: Mapping[str, float | None], info: Info, unlabeled: Sequence[int] | None) -> Any:
    """A wandb.Table with one row a class: labeled and unlabeled images, group, test accuracy in percent."""
    import wandb

    group_of = {k: name for name, members in class_groups(info.labeled_counts).items() for k in members}
    rows = [
        [name, info.labeled_counts[k], unlabeled and unlabeled[k], group_of[k], accuracies[name]]
        for k, name in enumerate(info.class_names)
    ]
    return wandb.Table(columns=["class", "labeled", "unlabeled", "group", "accuracy"], data=rows)


def confusion_rows(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[list[Any]]:
    """True class, predicted class and number of each cell; of a matrix too large for a chart those above 0 alone."""
    cells = [[names[i], names[j], n] for i, row in enumerate(confusion) for j, n in enumerate(row)]
    return cells if len(cells) <= MOST_CELLS else [cell for cell in cells if cell[2]]


def _histogram(shares: list[float]) -> Any:
    import wandb

    if len(shares) > MOST_BINS:
        return None
    return wandb.Histogram(np_histogram=(np.asarray(shares), np.arange(len(shares) + 1)))


def open_tracker(
    mode: str,
    *,
    project: str,
    name: str,
    folder: Path,
    config: dict[str, Any],
    group: str | None = None,
    tags: Sequence[str] = (),
    logged: int | None = None,
    say: Callable[[str], None] = print,
) -> Tracker:
    """A W&B run: online when somebody is logged in and the server answers, offline otherwise; `off` gives a no-op.

    Args:
        mode: "auto", "online", "offline" or "off". WANDB_MODE in the environment decides where mode is "auto".
        project, name, config, group, tags: as W&B shows them.
        folder: where W&B keeps its files, and the run its id.
        logged: of a run that goes on, the last step it has logged; None for a new one.
        say: takes one line about what was chosen and why.
    """
    if mode == "auto":
        mode = {"disabled": "off", "dryrun": "offline"}.get(
            os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE", "auto")
        )
    if mode == "off":
        return Tracker(None, say)
    try:
        identity = _kept_id(folder, say) if logged is not None else None
        known, identity = identity is not None, identity or _new_id(folder)
    except OSError as error:
        say(f"wandb: off ({folder / ID}: {error.strerror})")
        return Tracker(None, say)
    done = logged if known and logged else 0
    shown = {"project": project, "name": name, "config": config, "group": group, "tags": list(tags), "id": identity}
    reason = "" if mode == "offline" else why_offline()
    if mode != "offline" and not reason:
        run, reason = _init("online", folder, shown)
        if run is not None:
            say(f"wandb: {run.url}")
            return Tracker(run, say, run.step - 1 if run.resumed else done)  # the server knows best
    run, problem = _init("offline", folder, shown)
    why = f" ({reason})" if reason else ""
    upload = f"upload later with `wandb sync {folder}/wandb/offline-run-*`"
    say(f"wandb: off ({problem})" if run is None else f"wandb: offline{why}; {upload}")
    return Tracker(run, say, done)


def why_offline() -> str:
    """Why an online run cannot be started: nobody is logged in, or the server does not answer. "" when it can.

    A plain connection attempt of at most four seconds comes first, because W&B's own start can block far longer.
    """
    import wandb
    from requests.utils import get_netrc_auth  # `wandb login` keeps the key in the netrc file

    base = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    if not (os.environ.get("WANDB_API_KEY") or get_netrc_auth(base)):
        return "nobody is logged in"
    route = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or base)
    host, port = route.hostname or "", route.port or (443 if route.scheme == "https" else 80)
    answers: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            answers.append("")
        except OSError as error:
            answers.append(f"{host} does not answer: {error}")

    # In a thread of its own, because looking a name up knows no time limit.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(2 * CONNECT_SECONDS)
    return answers[0] if answers else f"{host} does not answer within {2 * CONNECT_SECONDS:g} s"


def _kept_id(folder: Path, say: Callable[[str], None]) -> str | None:
    """The id that the run has had at W&B; None where it has none or the file is damaged, which is said."""
    if not (folder / ID).exists():
        return None
    content = (folder / ID).read_bytes()
    if re.fullmatch(rb"[0-9a-z]{1,64}", content):
        return content.decode()
    say(f"warning: {folder / ID} holds no id of W&B's; the run goes on there as another.")
    return None


def _new_id(folder: Path) -> str:
    identity = secrets.token_hex(8)
    with replacing(folder / ID) as file:
        file.write(identity.encode())
    return identity


def _init(mode: str, folder: Path, shown: dict[str, Any]) -> tuple[Any, str]:
    import wandb

    settings = wandb.Settings(init_timeout=INIT_SECONDS, silent=True, console="off")
    # What older versions do not know: they wait for a lost server without end, and write as they please.
    for name, seconds in (("finish_timeout", FINISH_SECONDS), ("x_transaction_log_flush_interval", WRITE_SECONDS)):
        if name in wandb.Settings.model_fields:
            setattr(settings, name, seconds)
    try:
        # allow: what is there under this id is added to, at once or by `wandb sync`; what is not, is new.
        run = wandb.init(mode=mode, dir=str(folder), resume="allow", settings=settings, **shown)  # type: ignore[arg-type]
    except Exception as error:  # whatever it is: training matters more than its record
        return None, " ".join(str(error).split())
    return run, ""
