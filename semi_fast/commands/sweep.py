"""Every method with every seed, and one table of what came out."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import UserError, unknown
from pipelines.reading import DataFacts, read_facts
from semi_fast.commands.sweep_processes import Job, Outcome, choose_devices, run_all
from semi_fast.config import Settings, load_settings, read_run_config
from semi_fast.digits import build_missing_digits
from semi_fast.methods import method_names
from semi_fast.reporting.sweep_table import Row, make_row, write_table
from semi_fast.run.folder import differences
from semi_fast.run.summary import read_summary

GIVEN_BY_SWEEP = {"method": "--methods", "seed": "--seeds", "run_dir": "--out"}  # settings a cell must not set itself


class Cell(NamedTuple):
    """One run of the sweep."""

    seed: int
    folder: Path
    settings: Settings
    arguments: list[str]  # of the training command

    @property
    def name(self) -> str:
        return f"{self.settings.method.name} seed {self.seed}"


def sweep(settings: Sequence[str], methods: str | None, seeds: str, out: Path | None, devices: str) -> int:
    """Train every cell and write results.md, .csv and .json beside them.

    Args:
        settings: settings files and `key=value`, as for training.
        methods, seeds: separated by commas; None: all methods.
        out: the sweep's folder; None: sweeps/<data>. devices: see `choose_devices`.

    Returns: 0, 1 when a cell failed, 128 + n when signal n stopped the sweep.
    Raises: UserError, before anything is trained, for whatever is wrong with the command, the data or the folder.
    """
    out, cells = plan(settings, methods, seeds, out)
    build_missing_digits(cells[0].settings.data.path)
    facts = read_facts(cells[0].settings.data.path)
    gpus = choose_devices(devices)
    with sweep_lock(out):
        open_cells = [cell for cell in cells if not finished(cell, facts)]
        done = len(cells) - len(open_cells)
        print(f"sweep: {out}, {len(cells)} cells, {done} finished; on {', '.join(gpus) or 'the CPU'}", flush=True)

        def after_each(_: Outcome) -> None:
            try:
                write_table(out, rows_of(cells, facts))
            except OSError as error:  # a full disk: the runs go on, and the table is written again after the next
                print(f"warning: the table was not written: {error}", file=sys.stderr, flush=True)

        jobs = [Job(cell.name, cell.arguments, cell.folder / "console.txt") for cell in open_cells]
        outcomes, signum = run_all(jobs, gpus, after_each)
        try:
            write_table(out, rows_of(cells, facts))
        except OSError as error:
            raise UserError(f"Cannot write the table to {out}: {error}. The same command writes it again.") from None
    print((out / "results.md").read_text(encoding="utf-8"), end="", flush=True)
    if signum is not None:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 128 + signum
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    for outcome in failed:
        print(f"failed: {outcome.name}, exit code {outcome.code}: {outcome.last_line}", file=sys.stderr)
    return 1 if failed else 0


def plan(settings: Sequence[str], methods: str | None, seeds: str, out: Path | None) -> tuple[Path, list[Cell]]:
    """The sweep's folder and its cells, seed by seed, so that methods can be compared early; all settings are checked.

    Raises: UserError for an unknown method or setting, or one that the sweep itself gives.
    """
    for text in settings:
        key = text.partition("=")[0] if "=" in text else ""
        for name, option in GIVEN_BY_SWEEP.items():
            if key in (name, f"{name}.name"):
                raise UserError(f"A sweep sets {name} for each cell, got '{text}'. Use {option}.")
    names = method_names() if methods is None else split_list(methods, "--methods")
    for name in names:
        if name not in method_names():
            raise unknown("method", name, method_names())
    numbers = split_list(seeds, "--seeds")
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"--seeds takes whole numbers from 0, separated by commas (0,1,2), got '{seeds}'.")
    folder = out or Path("sweeps") / Path(load_settings([*settings, f"method={names[0]}"]).data.path).name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a folder, and {folder} is a file. Name another.")
    cells = []
    for seed in map(int, numbers):
        for name in names:
            run = folder / f"{name}-seed{seed}"
            # Quoted: the value of an override is read as YAML.
            arguments = [*settings, f"method={name}", f"seed={seed}", f"run_dir={json.dumps(str(run))}"]
            cells.append(Cell(seed, run, load_settings(arguments), arguments))
    return folder, cells


def split_list(text: str, option: str) -> list[str]:
    """Words separated by commas. Raises: UserError for none, an empty one, or one given twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) < len(words):
        raise UserError(f"{option} takes different names, separated by commas, got '{text}'.")
    return words


def finished(cell: Cell, facts: DataFacts) -> bool:
    """Whether a cell's run is finished.

    Raises: UserError where its folder holds a run of other settings or data: a sweep mixes nothing.
    """
    if not (cell.folder / "config.yaml").exists():
        return False
    apart = differences(cell.settings.model_dump(), read_run_config(cell.folder))
    summary = read_summary(cell.folder)
    if summary is not None and summary.data_fingerprint != facts.info.fingerprint:
        apart.append(f"data.path: {cell.settings.data.path} does not hold the data of that run")
    if apart:
        raise UserError(
            f"{cell.folder} holds a run of other settings ({'; '.join(apart)}). Name another --out, or delete it."
        )
    return summary is not None


def rows_of(cells: Sequence[Cell], facts: DataFacts) -> list[Row]:
    """A row a method, of the cells that are finished by now."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.settings.method.name, []).append(cell)
    return [
        make_row(group[0].settings, facts, {cell.seed: read_summary(cell.folder) for cell in group})
        for group in groups.values()
    ]


@contextmanager
def sweep_lock(out: Path) -> Iterator[None]:
    """Keep a second sweep out of the folder. Runs inherit the lock, so that none outlives its sweep unseen."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"Cannot write to the sweep's folder {out}: {error}. Name another --out.") from None
    try:
        os.set_inheritable(handle, True)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another sweep, or a run that one started, is at work in {out}. Wait for it, or end it."
            ) from None
        yield
    finally:
        os.close(handle)
