"""Every method with every seed, and one table: `python -m semi_fast sweep [CONFIG] [key=value ...] --methods A,B`.

    python -m semi_fast sweep configs/cifar10_lt.yaml --methods supervised,fixmatch,semi --seeds 0,1,2 steps=250000

A cell is one run, in a process of its own: one after another, or one a GPU where the machine has several. The same
command goes on where it stood: finished cells are kept, unfinished ones go on from their newest checkpoint. A cell that
fails does not end the others. Cells and the table (results.md, .csv, .json) are in sweeps/<data>/, or in --out.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_prep.errors import UserError, unknown
from data_prep.folder.manifest import Manifest, read_manifest
from semi_fast.commands.sweep_processes import Outcome, choose_devices, run_all
from semi_fast.config import Settings, load_settings
from semi_fast.digits import build_missing_digits
from semi_fast.methods import method_names
from semi_fast.reporting.sweep_table import Row, make_row, write_table
from semi_fast.run.folder import differences

GIVEN_BY_SWEEP = {"method": "--methods", "seed": "--seeds", "run_dir": "--out"}  # settings a cell must not set itself


class Cell(NamedTuple):
    """One run of the sweep."""

    method: str
    seed: int
    folder: Path
    settings: Settings
    arguments: list[str]  # of the training command

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, 1 when a cell failed, 128 + n when signal n stopped the sweep.

    Raises: UserError, before anything is trained, for whatever is wrong with the command, the data or --out.
    """
    given = parse(argv)
    out, cells = plan(given.settings, split_list(given.methods, "--methods"), seeds_of(given.seeds), given.out)
    build_missing_digits(cells[0].settings.data.path)
    manifest = read_manifest(cells[0].settings.data.path)
    devices = choose_devices(given.devices)
    with sweep_lock(out):
        open_cells = [cell for cell in cells if not finished(cell, manifest)]
        done = len(cells) - len(open_cells)
        print(f"sweep: {out}, {len(cells)} cells, {done} finished; on {', '.join(devices) or 'the CPU'}", flush=True)

        def after_each(_: Outcome) -> None:
            try:
                write_table(out, rows_of(cells, manifest))
            except OSError as error:  # a full disk: the runs go on, and the table is written again after the next
                print(f"warning: the table was not written: {error}", file=sys.stderr, flush=True)

        outcomes = run_all([(c.name, c.arguments, c.folder / "console.txt") for c in open_cells], devices, after_each)
        try:
            write_table(out, rows_of(cells, manifest))
        except OSError as error:
            raise UserError(f"Cannot write the table to {out}: {error}. The same command writes it again.") from None
    print((out / "results.md").read_text(encoding="utf-8"), end="", flush=True)
    failed = [outcome for outcome in outcomes.ended if outcome.code != 0]
    for outcome in failed if outcomes.signum is None else []:
        print(f"failed: {outcome.name}, exit code {outcome.code}: {outcome.last_words}", file=sys.stderr)
    if outcomes.signum is not None:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 128 + outcomes.signum
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as it was given."""
    parser = argparse.ArgumentParser(
        prog="python -m semi_fast sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help="as for training, for every cell")
    parser.add_argument("--methods", default="supervised,fixmatch,semi", help="names, separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="whole numbers, separated by commas")
    parser.add_argument("--out", help="folder of the sweep; default: sweeps/<data>")
    parser.add_argument("--devices", default="auto", help="auto: every GPU, else the CPU; cpu; or GPUs such as 0,2")
    return parser.parse_intermixed_args(argv)


def plan(settings: Sequence[str], methods: list[str], seeds: list[int], out: str | None) -> tuple[Path, list[Cell]]:
    """The sweep's folder and its cells, seed by seed, so that methods can be compared early; all settings are checked.

    Raises: UserError for an unknown method or setting, or one that the sweep itself gives.
    """
    for text in settings:
        key = text.partition("=")[0] if "=" in text else ""
        for name, option in GIVEN_BY_SWEEP.items():
            if key in (name, f"{name}.name"):
                raise UserError(f"A sweep sets {name} for each cell, got '{text}'. Use {option}.")
    data = Path(load_settings([*settings, f"method={methods[0]}"]).data.path)
    folder = Path(out) if out else Path("sweeps") / data.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a folder, and {folder} is a file. Name another.")
    cells = []
    for seed in seeds:
        for method in methods:
            place = folder / f"{method}-seed{seed}"
            # Quoted: the value of an override is read as YAML.
            arguments = [*settings, f"method={method}", f"seed={seed}", f"run_dir={json.dumps(str(place))}"]
            cells.append(Cell(method, seed, place, load_settings(arguments), arguments))
    return folder, cells


def split_list(text: str, option: str) -> list[str]:
    """Names separated by commas. Raises: UserError for none, an empty one, or one given twice."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{option} takes different names, separated by commas, got '{text}'.")
    if option == "--methods":
        for name in names:
            if name not in method_names():
                raise unknown("method", name, method_names())
    return names


def seeds_of(text: str) -> list[int]:
    """Seeds separated by commas. Raises: UserError for what is none."""
    names = split_list(text, "--seeds")
    if not all(name.isdecimal() for name in names):
        raise UserError(f"--seeds takes whole numbers from 0, separated by commas (0,1,2), got '{text}'.")
    return [int(name) for name in names]


def finished(cell: Cell, manifest: Manifest) -> bool:
    """Whether a cell's run is finished.

    Raises: UserError where its folder holds a run of other settings or data: a sweep mixes nothing.
    """
    try:
        saved = yaml.safe_load((cell.folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{cell.folder}/config.yaml cannot be read ({error}). Delete {cell.folder}.") from None
    found = differences(cell.settings.model_dump(), saved if isinstance(saved, dict) else {})
    summary = read_summary(cell)
    if summary is not None and summary["data_fingerprint"] != manifest.fingerprint:
        found.append(f"data.path: {cell.settings.data.path} does not hold the data of that run")
    if found:
        raise UserError(
            f"{cell.folder} holds a run of other settings ({'; '.join(found)}). Name another --out, or delete it."
        )
    return summary is not None


def read_summary(cell: Cell) -> dict[str, Any] | None:
    """summary.json of a finished run, else None. Raises: UserError when it is damaged."""
    path = cell.folder / "summary.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete {cell.folder} to train it again.") from None


def rows_of(cells: list[Cell], manifest: Manifest) -> list[Row]:
    """A row a method, of the cells that are finished by now."""
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    return [
        make_row(group[0].settings, manifest, [(cell.seed, read_summary(cell)) for cell in group])
        for group in by_method.values()
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


def cli(argv: Sequence[str]) -> int:
    """`main`, with a user's mistake as one line and exit code 2."""
    try:
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
