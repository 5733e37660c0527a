"""The paper's tables: data built, every row trained on every data set, and ours set beside the published figures."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError, unknown
from data_prep.files import replacing
from pipelines.reading import read_facts
from semi_fast.commands.sweep import (
    GIVEN_BY_SWEEP,
    Cell,
    check_out,
    choose_devices,
    place,
    refuse,
    split_list,
    train_cells,
)
from semi_fast.commands.table_plan import print_plan
from semi_fast.config import CONFIGS, PROTOCOL, Settings, flatten, load_settings, read_run_config, resolve
from semi_fast.methods import check_options, method_names
from semi_fast.reporting import paper
from semi_fast.reporting.paper import PaperFigure, PaperRow, Setting, figures_of, rule
from semi_fast.reporting.sweep_table import Row, make_row, write_files
from semi_fast.reporting.table import markdown, picture
from semi_fast.run.folder import deciding, differences
from semi_fast.run.saved import run_facts
from semi_fast.run.summary import Summary, read_summary

GIVEN = {**GIVEN_BY_SWEEP, "data": "--data"}
BUILD = ["-m", "data_prep.build"]


class Choice(NamedTuple):
    """What the command line chooses, as it gives it; None: all, or as the tables' rules have it."""

    table: str  # number of the paper's table, or figures
    settings: Sequence[str]  # for every run of a chosen row
    data: Path  # folder of data folders
    out: Path
    seeds: Sequence[int]
    cells: str | None = None
    methods: str | None = None
    protocol: str | None = None
    sources: Sequence[str] = ()  # NAME=PATH, of raw data


class Entry(NamedTuple):
    """One cell of a table: a row on a data set.

    chosen: whether it is to be run. paper: the paper's figure. others: those of other papers. cells: one a seed, and
    those that they begin with; none for a method that this project does not have, nor where no run can lie. usual: the
    same as the rules have them, whatever the command line says.
    """

    setting: Setting
    name: str
    row: PaperRow
    chosen: bool
    paper: PaperFigure | None
    others: list[PaperFigure]
    cells: list[list[Cell]]
    usual: list[list[Cell]]

    @property
    def runs(self) -> list[Cell]:
        """Those whose accuracy is the row's, one a seed."""
        return [cells[-1] for cells in self.cells]

    @property
    def usual_steps(self) -> int | None:
        return self.usual[0][-1].settings.steps if self.usual else None


def table(choice: Choice, *, planned: bool, devices: str) -> int:
    """Build what is missing, train what is not finished, and write table<number>.md, .csv, .json, .png and .svg.

    Args:
        planned: print what would be done, and how long it would take, instead. devices: see `choose_devices`.

    Returns: see `sweep`. Raises: UserError, before anything is trained, for what is wrong with command, data or folder.
    """
    choose_devices(devices)
    sources = sources_of(choice.sources)
    entries = lay_out(choice)
    cells = list({cell.folder: cell for e in entries if e.chosen for cells in e.cells for cell in cells}.values())
    cells.sort(key=lambda cell: choice.seeds.index(cell.seed))  # so that rows can be compared early
    data = {cell.settings.data.path: e.setting for e in entries if e.chosen for cs in e.cells for cell in cs}
    builds = [build_command(setting, path, sources) for path, setting in data.items() if not Path(path).exists()]
    if planned:
        print_plan(cells, builds, choice.out, devices, {path: int(s.resolution) for path, s in data.items()})
        return 0
    for arguments in builds:
        if subprocess.run([sys.executable, *arguments], check=False).returncode:
            raise UserError(
                f"python {shlex.join(arguments)} failed, for the reason above. Where the raw data is elsewhere, name "
                f"it: --source {arguments[len(BUILD)]}=PATH."
            )
    for path, setting in data.items():
        facts = read_facts(path)
        if Setting.of(facts.split, str(facts.info.resolution)) != setting or facts.split.get("test_from_train"):
            raise UserError(
                f"{path} does not hold {setting.label} with its own test images. Name another --data, or build it."
            )

    stem = choice.out / f"table{choice.table}"
    asked = {entry.setting for entry in entries if entry.chosen}

    def text(shown: Sequence[Entry], rows: Sequence[Row]) -> str:
        notes = [*rule(table=choice.table)["notes"], *source_notes(other for e in shown for other in e.others)]
        return markdown(rows, notes)

    def write() -> str:  # all columns to the files, which partial runs share; those asked for to the console
        rows = [row_of(choice.table, entry) for entry in entries]
        write_files(stem, rows, text(entries, rows))
        shown = [(e, row) for e, row in zip(entries, rows, strict=True) if e.setting in asked]
        return text([e for e, _ in shown], [row for _, row in shown])

    code = train_cells(choice.out, cells, devices, write)
    drawn = picture([row_of(choice.table, entry) for entry in entries], f"Table {choice.table}")
    for suffix in ("png", "svg"):
        with replacing(stem.with_suffix(f".{suffix}")) as file:
            file.write(drawn.files[suffix])
    return code


def figures(choice: Choice) -> int:
    """Write a page with the paper's Figures 3 to 6 for every data set chosen, of its finished runs of the first seed.

    Returns: 0. Raises: UserError for a data set or method that does not exist, and where there is no finished run.
    """
    from semi_fast.reporting.paper_figures import write_figures
    from semi_fast.reporting.rundata import gather_run

    asked = None if choice.methods is None else split_list(choice.methods, "--methods")
    for name in asked or []:
        if name not in method_names():
            raise unknown("method", name, method_names())
    written = False
    for setting in choose_columns(list(figures_of(paper.TABLES)), choice.cells):
        folders = sorted(
            file.parent for file in (choice.out / setting.folder).glob(f"*-seed{choice.seeds[0]}/summary.json")
        )
        runs = [gather_run(f) for f in folders if asked is None or read_run_config(f)["method"]["name"] in asked]
        if runs:
            print(write_figures(runs, choice.out / f"figures-{setting.folder}.html", setting.label))
            written = True
    if not written:
        raise UserError(
            f"No finished run of seed {choice.seeds[0]} in {choice.out} for that choice. Train some: "
            "python -m semi_fast table 1 --cells ... --methods ..."
        )
    return 0


def lay_out(choice: Choice) -> list[Entry]:
    """The cells of a table, data set by data set: its rows in its order, after them those of other papers.

    What is not chosen stands there, too, with the runs it may have.

    Raises: UserError for a table, data set, method or setting that does not exist.
    """
    refuse(choice.settings, GIVEN)
    check_protocols(choice)
    check_out(choice.out)
    every = figures_of(paper.TABLES)
    columns = {s: {f.row: f for f in figures if str(f.table) == choice.table} for s, figures in every.items()}
    columns = {setting: rows for setting, rows in columns.items() if rows}
    if not columns:
        raise unknown("table", choice.table, [*sorted({str(f.table) for fs in every.values() for f in fs}), "figures"])
    chosen = choose_columns(list(columns), choice.cells)
    own = {row: f.name for rows in columns.values() for row, f in rows.items()}
    others = {setting: figures_of(paper.OTHERS).get(setting, []) for setting in columns}
    unchanged = choice._replace(settings=(), protocol=None)
    names = own | {f.row: f.name for figures in others.values() for f in figures if f.row not in own}
    wanted = choose_rows(names, list(own), choice.methods)
    entries = []
    for setting, figures in columns.items():
        there = setting in chosen or (choice.out / setting.folder).is_dir()
        for row, name in (names | {row: row[0] for row in wanted if row not in names}).items():
            theirs, mine = [f for f in others[setting] if f.row == row], setting in chosen and row in wanted
            if row not in own and not mine and not theirs:
                continue
            usual, cells = [
                [cells_of(c, setting, row, seed, name) for seed in choice.seeds if there and row[0] in method_names()]
                for c in (unchanged, choice if mine else unchanged)
            ]
            entries.append(Entry(setting, name, row, mine, figures.get(row), theirs, cells, usual))
    return entries


def check_protocols(choice: Choice) -> None:
    """Raise UserError for a settings file that is no protocol's: the data set is that of the cell."""
    words = [word for word in choice.settings if "=" not in word]
    for word in words if choice.protocol is None else [choice.protocol, *words]:
        if not Path(word).name.startswith(PROTOCOL):
            known = ", ".join(sorted(file.stem for file in CONFIGS.glob(f"{PROTOCOL}*.yaml")))
            raise UserError(f"A table takes key=value and protocols' settings files, got '{word}'. There are: {known}.")


def choose_columns(settings: Sequence[Setting], text: str | None) -> list[Setting]:
    """The data sets that --cells names: groups of words, separated by commas, each for all that have these words.

    Raises: UserError for a word that none has, and for a group that fits none.
    """
    if text is None:
        return list(settings)
    known = dict.fromkeys(word for setting in settings for word in setting.label.split())
    chosen: list[Setting] = []
    for group in text.split(","):
        for word in group.split():
            if word not in known:
                raise unknown("word of --cells", word, known)
        fits = [setting for setting in settings if set(group.split()) <= set(setting.label.split())]
        if not fits or not group.strip():
            raise UserError(
                f"--cells: no data set here is '{group.strip()}'. There are: "
                f"{', '.join(setting.label for setting in settings)}."
            )
        chosen += fits
    return [setting for setting in settings if setting in chosen]


def choose_rows(names: dict[PaperRow, str], usual: list[PaperRow], text: str | None) -> list[PaperRow]:
    """The rows that --methods names, by method or by the paper's name; a method that no row has is one of its own.

    Args:
        names: of the rows, by method and options. usual: those taken without --methods.

    Raises: UserError for a name that neither a row nor a method has.
    """
    if text is None:
        return usual
    chosen: list[PaperRow] = []
    for word in split_list(text, "--methods"):
        fits = [row for row, name in names.items() if word == row[0] or word.lower() == name.lower()]
        if not fits and word not in method_names():
            raise unknown("method or row", word, dict.fromkeys([*method_names(), *names.values()]))
        chosen += fits or [(word, "")]
    return chosen


def cells_of(
    choice: Choice, setting: Setting, row: PaperRow, seed: int, name: str, *, whole: bool = True
) -> list[Cell]:
    """The run of a row on a data set; where it is `whole`, behind the run that it begins with, if any."""
    method, options = row
    found = rule(method=method, options=options, **setting._asdict())
    given = [word for word in choice.settings if whole or _fits(word, method)]
    words = [found["file"], choice.protocol or found["protocol"], *found["settings"], *given]
    words += [f"method={method}", *(f"method.{option}" for option in options.split())]
    stem, before = "-".join([method, *options.split()]), []
    if whole and "start" in found:
        key, _, other = found["start"].partition("=")
        before = cells_of(choice, setting, (other, ""), seed, f"{name}, first run", whole=False)
        words.append(f"{key}={json.dumps(str(before[0].folder))}")
        stem += f"-{key.rpartition('.')[2]}"
    folder, settings = choice.out / setting.folder / f"{stem}-seed{seed}", _load(tuple(words))
    path = str(choice.data / (setting.folder + "-disjoint" * bool(settings.data.disjoint)))
    data = settings.data.model_copy(update={"path": path, "build": None})
    settings = settings.model_copy(update={"data": data, "seed": seed, "run_dir": str(folder)})
    arguments = [*words, f"data={json.dumps(path)}", *place(seed, folder)]
    return [*before, Cell(f"{name}, {setting.label}, seed {seed}", seed, folder, settings, arguments, bool(before))]


def _fits(word: str, method: str) -> bool:
    """Whether a setting is not an option of another method."""
    section, _, option = word.partition("=")[0].partition(".")
    return section != "method" or option in check_options(method, {})


@cache  # a table has as many runs of the same settings as data sets and seeds
def _load(words: tuple[str, ...]) -> Settings:
    return load_settings(words)


def sources_of(texts: Sequence[str]) -> dict[str, str]:
    """Paths of raw data by data set. Raises: UserError for a --source that is no NAME=PATH of the tables' data sets."""
    sources = {name: place for name, _, place in (text.partition("=") for text in texts)}
    known = dict.fromkeys(s.dataset for s in figures_of(paper.TABLES))
    for name, path in sources.items():
        if name not in known:
            raise unknown("data set of --source NAME=PATH", name, known)
        if not path:
            raise UserError(f"--source reads NAME=PATH, got '{name}' without a path. Write --source {name}=PATH.")
    return sources


def build_command(setting: Setting, path: str, sources: Mapping[str, str]) -> list[str]:
    """Arguments of Python that build a data folder."""
    source = ["--source", sources[setting.dataset]] if setting.dataset in sources else []
    disjoint = ["--disjoint"] if path.endswith("-disjoint") else []
    return [*BUILD, *setting.build, *disjoint, *source, "--out", path]


def row_of(number: str, entry: Entry) -> Row:
    """A cell as the table's files have it: the sweep's row, and what the table adds.

    changed: settings of its runs, or of those that they begin with, that are not as the rules have them. A row that is
    not chosen is shown with the settings its runs were made with, where these are the same for all.
    """
    chains = entry.cells if entry.chosen else [[_as_made(cell) for cell in cells] for cells in entry.cells]
    found = [(c[-1], _summary(c[-1]), _changed(c, usual)) for c, usual in zip(chains, entry.usual, strict=True)]
    run, _, changed = next((one for one in found if one[1]), found[0] if found else (None, None, {}))
    summaries = {other.seed: summary if apart == changed else None for other, summary, apart in found}
    done = any(summaries.values())
    facts = run_facts(run.folder, run.settings.data.path) if run and done else None
    row = make_row(run.settings if run else Settings(), facts, summaries, entry.paper)
    if not run:
        row |= {"method": entry.row[0], "protocol": "", "figure": "", "steps": None, "settings": {}}
    return {
        "table": number,
        "cell": entry.setting.label,
        "row": entry.name,
        "options": entry.row[1],
        "state": "" if done else "not run" if entry.row[0] in method_names() else "not in this project",
        **row,
        "usual_steps": entry.usual_steps,
        "changed": ", ".join(changed) if done else "",
        "published": {figure.source: str(figure) for figure in entry.others},
    }


def _as_made(cell: Cell) -> Cell:
    """A cell with the settings of the run in its folder, if any."""
    if not (cell.folder / "config.yaml").exists():
        return cell
    try:
        return cell._replace(settings=resolve(read_run_config(cell.folder)))
    except UserError:  # of another version of this program: its settings differ, so that it is not shown
        return cell


def _changed(cells: Sequence[Cell], usual: Sequence[Cell]) -> dict[str, Any]:
    """Settings that decide a result and are not the usual ones, of a run and of that which it begins with."""
    changed: dict[str, Any] = {}
    for cell, other in zip(cells, usual, strict=True):
        now, then = (deciding(flatten(c.settings.model_dump())) for c in (cell, other))
        prefix = "" if cell is cells[-1] else "first run: "
        changed |= {prefix + key: value for key, value in now.items() if key not in then or value != then[key]}
    return changed


def _summary(run: Cell) -> Summary | None:
    """That of a cell's run; None where it is not finished, or of other settings."""
    if not (run.folder / "config.yaml").exists():
        return None
    return None if differences(run.settings.model_dump(), read_run_config(run.folder)) else read_summary(run.folder)


def source_notes(figures: Iterable[PaperFigure]) -> list[str]:
    """What is to be known of the figures of other papers, by source."""
    return list(dict.fromkeys(f"{f.source}: {f.note}." for f in figures if f.note))
