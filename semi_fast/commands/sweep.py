"""Every method with every seed, and one table of what came out."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.cores import usable_cores
from data_prep.errors import UserError, unknown
from pipelines import read_info
from pipelines.reading import DataFacts, read_facts
from semi_fast.config import SEEDS, Settings, load_settings, read_run_config
from semi_fast.digits import build_missing_digits
from semi_fast.methods import method_names
from semi_fast.reporting.paper import paper_figure
from semi_fast.reporting.sweep_table import Row, make_row, markdown, write_files
from semi_fast.run.folder import differences
from semi_fast.run.summary import read_summary
from semi_fast.training.stopping import SIGNALS

COMMAND = [sys.executable, "-m", "semi_fast.train"]
GIVEN_BY_SWEEP = {"method": "--methods", "seed": "--seeds", "run_dir": "--out"}  # settings a cell must not set itself


class Cell(NamedTuple):
    """One run of the sweep. name: for people. later: whether it begins with what another run of the sweep leaves."""

    name: str
    seed: int
    folder: Path
    settings: Settings
    arguments: list[str]  # of the training command
    later: bool = False


def sweep(settings: Sequence[str], methods: str | None, seeds: str, out: Path | None, devices: str) -> int:
    """Train every cell and write results.md, .csv and .json beside them.

    Returns: 0, 1 when a cell failed, 128 + n when signal n stopped the sweep.
    Raises: UserError, before anything is trained, for whatever is wrong with the command, the data or the folder.
    """
    out, cells = plan(settings, methods, seeds, out)
    build_missing_digits(cells[0].settings.data.path)
    facts = read_facts(cells[0].settings.data.path)

    def write() -> str:
        rows = rows_of(cells, facts)
        return write_files(out / "results", rows, markdown(rows))

    return train_cells(out, cells, devices, write)


def train_cells(out: Path, cells: Sequence[Cell], devices: str, write: Callable[[], str]) -> int:
    """Train the cells that are not finished, in their order, those that need another run after the others.

    Args:
        out: the folder to lock. devices: see `choose_devices`.
        write: called whenever a run has ended: writes the table and returns it as text.

    Returns, raises: see `sweep`.
    """
    gpus = choose_devices(devices)
    with sweep_lock(out):
        open_cells = [cell for cell in cells if not finished(cell)]
        done = len(cells) - len(open_cells)
        print(f"sweep: {out}, {len(cells)} cells, {done} finished; on {', '.join(gpus) or 'the CPU'}", flush=True)

        def after_each(_: Outcome) -> None:
            try:
                write()
            except OSError as error:  # a full disk: the runs go on, and the table is written again after the next
                print(f"warning: the table was not written: {error}", file=sys.stderr, flush=True)

        outcomes: list[Outcome] = []
        for later in (False, True):
            due = [cell for cell in open_cells if cell.later == later]
            jobs = [Job(cell.name, cell.arguments, cell.folder / "console.txt") for cell in due]
            ended, signum = run_all(jobs, gpus, after_each)
            outcomes += ended
            if signum is not None:
                break
        try:
            text = write()
        except OSError as error:
            raise UserError(f"Cannot write the table to {out}: {error}. The same command writes it again.") from None
    print(text, end="", flush=True)
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
    refuse(settings, GIVEN_BY_SWEEP)
    names = method_names() if methods is None else split_list(methods, "--methods")
    for name in names:
        if name not in method_names():
            raise unknown("method", name, method_names())
    numbers = seed_list(seeds)
    folder = out or Path("sweeps") / Path(load_settings([*settings, f"method={names[0]}"]).data.path).name
    check_out(folder)
    cells = []
    for seed in numbers:
        for name in names:
            run = folder / f"{name}-seed{seed}"
            arguments = [*settings, f"method={name}", *place(seed, run)]
            cells.append(Cell(f"{name} seed {seed}", seed, run, load_settings(arguments), arguments))
    return folder, cells


def place(seed: int, folder: Path) -> list[str]:
    """The settings that set a cell's run apart from others. Quoted: the value of an override is read as YAML."""
    return [f"seed={seed}", f"run_dir={json.dumps(str(folder))}"]


def refuse(settings: Sequence[str], given: Mapping[str, str]) -> None:
    """Raise UserError for an override that the command itself gives; given: the option to use by setting."""
    for text in settings:
        key = text.partition("=")[0] if "=" in text else ""
        for name, option in given.items():
            if key in (name, f"{name}.name", f"{name}.path"):
                raise UserError(f"Each cell's {name} is set by the command, got '{text}'. Use {option}.")


def seed_list(text: str) -> list[int]:
    """Seeds as --seeds has them. Raises: UserError."""
    numbers = split_list(text, "--seeds")
    # Of a number of thousands of digits Python makes none.
    if not all(n.isdecimal() and len(n) <= len(str(SEEDS)) and int(n) < SEEDS for n in numbers):
        raise UserError(
            f"--seeds takes whole numbers from 0 to {SEEDS - 1}, separated by commas (0,1,2), got '{text}'."
        )
    return [int(number) for number in numbers]


def check_out(folder: Path) -> None:
    """Raise UserError where --out is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a folder, and {folder} is a file. Name another.")


def split_list(text: str, option: str) -> list[str]:
    """Words separated by commas. Raises: UserError for none, an empty one, or one given twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) < len(words):
        raise UserError(f"{option} takes different names, separated by commas, got '{text}'.")
    return words


def finished(cell: Cell) -> bool:
    """Whether a cell's run is finished.

    Raises: UserError where its folder holds a run of other settings or data: a sweep mixes nothing.
    """
    if not (cell.folder / "config.yaml").exists():
        return False
    apart = differences(cell.settings.model_dump(), read_run_config(cell.folder))
    summary = read_summary(cell.folder)
    if summary is not None and summary.data_fingerprint != read_info(cell.settings.data.path).fingerprint:
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
    rows = []
    for group in groups.values():
        settings = group[0].settings
        paper = paper_figure(facts.split, facts.info.resolution, settings.method.name, settings.method.options)
        rows.append(make_row(settings, facts, {cell.seed: read_summary(cell.folder) for cell in group}, paper))
    return rows


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


class Job(NamedTuple):
    """One run: its name, the arguments of the training command, and the file that keeps its output."""

    name: str
    arguments: list[str]
    output: Path


class Outcome(NamedTuple):
    """How a run ended."""

    name: str
    code: int  # 0: finished; as the shell has it, 128 + n when signal n ended it
    last_line: str  # of its output


def run_all(
    jobs: Sequence[Job], devices: Sequence[str], after_each: Callable[[Outcome], None]
) -> tuple[list[Outcome], int | None]:
    """Run the jobs, as many at a time as there are devices, and wait for them.

    SIGINT and SIGTERM are passed on to the runs, which save themselves and end; no further one is started.

    Args:
        jobs: in the order to start them. devices: see `choose_devices`; [] runs one at a time on the CPU.
        after_each: called in this thread whenever a run has ended.

    Returns: how those that were started ended, and the signal that stopped the sweep, if any did.
    """
    running: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []
    lock = threading.RLock()  # a process starts before a signal or not at all
    idle = queue.SimpleQueue[str]()
    for device in devices or ["cpu"]:
        idle.put(device)
    threads = [f"threads={max(1, usable_cores() // len(devices))}"] if len(devices) > 1 else []

    def stop(signum: int, _: Any = None) -> None:
        with lock:
            signals.append(signum)
            for process in running:
                process.send_signal(signum)  # does nothing to one that has ended

    def run(job: Job) -> Outcome | None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        more = [] if any(text.startswith("threads=") for text in job.arguments) else threads
        device = idle.get()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
        try:
            with lock:
                if signals:
                    return None
                name = "the CPU" if device == "cpu" else f"GPU {device}"
                print(f"[{job.name}] starts on {name}: {job.output}", flush=True)
                # A session of its own: Ctrl-C of the terminal reaches it through this process alone, once.
                # Open files are inherited: the lock of the sweep among them.
                own: Any = {"start_new_session": True, "close_fds": False}
                with job.output.open("ab") as file:
                    command = [*COMMAND, *job.arguments, *more]
                    process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, **own)
                running.append(process)
            code = process.wait()
        finally:
            idle.put(device)
        lines = filter(str.strip, reversed(job.output.read_text(encoding="utf-8", errors="replace").split("\n")))
        return Outcome(job.name, code if code >= 0 else 128 - code, next(lines, "").strip())

    before = {name: signal.signal(name, stop) for name in SIGNALS}
    ended = []
    try:
        with ThreadPoolExecutor(len(devices) or 1) as pool:
            try:
                for future in as_completed([pool.submit(run, job) for job in jobs]):
                    outcome = future.result()
                    if outcome is not None:
                        with lock:  # or this line and that of a run that starts end up as one
                            print(f"[{outcome.name}] exit code {outcome.code}: {outcome.last_line}", flush=True)
                        ended.append(outcome)
                        after_each(outcome)
            except BaseException:  # nothing may outlive the sweep
                stop(signal.SIGTERM)
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ended, signals[0] if signals else None


def choose_devices(asked: str) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES has them; [] for the CPU.

    Args:
        asked: "auto" for every GPU this process may use, "cpu", or GPUs separated by commas.

    Raises: UserError for a GPU that this machine does not have.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    present = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    if asked == "auto":
        return present
    if asked == "cpu":
        return []
    wanted = [name.strip() for name in asked.split(",")]
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(present):
        known = f"GPUs {', '.join(present)}" if present else "no GPU"
        raise UserError(f"--devices reads auto, cpu, or GPUs such as 0,1, got '{asked}'; this machine has {known}.")
    return wanted
