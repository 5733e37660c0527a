"""Which folder a run writes to, and whether what lies there is the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipelines import Info
from semi_fast.config import Settings, expand, flatten, read_run_config
from semi_fast.methods import check_options, method_names

# Settings that may differ between a run and its resumption: none of them changes what is computed.
# (on_nonfinite: only of the steps that would have ended the run.)
FREE = {
    *("threads", "log_every", "eval_every", "save_every", "keep", "on_nonfinite", "resume", "run_dir"),
    *("wandb", "wandb_project", "ceiling", "quiet", "report", "data.build", "compile.graph"),
    "protocol",  # follows from the others
}


def deciding(settings: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Of settings in dotted form those that decide a result: none of FREE, nor the seed, nor `more`."""
    rest = {*FREE, "seed", *more}
    return {key: value for key, value in settings.items() if not {key, key.split(".")[0]} & rest}


def choose_folder(settings: Settings) -> Path:
    """The run's folder.

    `run_dir` where it is given. Otherwise `runs/<data>-<method>-seed<seed>`, and with -2, -3, ... behind it where that
    holds a finished run or one of other settings; an unfinished run of the same settings is gone on with.

    Raises: UserError when `run_dir` is a file, holds a finished run, or holds any run under resume=never.
    """
    if settings.run_dir is not None:
        folder = Path(settings.run_dir)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run_dir must be a folder, and {folder} is a file. Name another.")
        if (folder / "summary.json").exists():
            raise UserError(f"run_dir={folder} holds a finished run. Name another folder, or delete that one.")
        if settings.resume == "never" and (folder / "config.yaml").exists():
            raise UserError(
                f"run_dir={folder} holds a run, and resume=never starts anew. Name another, or delete that one."
            )
        return folder
    name = f"{Path(settings.data.path).name}-{settings.method.name}-seed{settings.seed}"
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not folder.exists() or (settings.resume == "auto" and _can_go_on(folder, settings)):
            return folder
        number += 1


def _can_go_on(folder: Path, settings: Settings) -> bool:
    if (folder / "summary.json").exists():
        return False
    try:
        return not differences(settings.model_dump(), read_run_config(folder))
    except UserError:  # no run, or one that is damaged: left as it is
        return False


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Settings that differ and matter, as `key: now X, saved Y`; those in FREE may differ.

    A setting or option that the saved ones lack is a later one: it counts as its default.

    Args:
        now, then: the settings of a run, and saved ones, as plain nested values.
    """
    then = expand(then)
    name = then.get("method", {}).get("name")
    options = check_options(name, {}) if name in method_names() else {}
    defaults = {**flatten(Settings().model_dump()), **{f"method.{key}": value for key, value in options.items()}}
    new, old = flatten(now), {**defaults, **flatten(then)}
    keys = sorted(key for key in new.keys() | old.keys() if not {key, key.split(".")[0]} & FREE)
    return [f"{key}: now {new.get(key)}, saved {old.get(key)}" for key in keys if new.get(key) != old.get(key)]


def check_same(
    settings: Settings, values: dict[str, Any], info: Info, folder: Path, *, other_world: bool = False
) -> None:
    """Raise UserError when a checkpoint's settings or data are not those of this run; it names the differences.

    `batch`, which is that of one process, may differ where the number of processes does (`other_world`), and with it
    what is said of the protocol.
    """
    found = differences(settings.model_dump(), values["settings"])
    found = [line for line in found if not (other_world and line.startswith(("batch: ", "protocol: ")))]
    if values["data_fingerprint"] != info.fingerprint:
        found.append(f"data.path: {settings.data.path} does not hold the data the run was started with")
    if found:
        raise UserError(
            f"{folder} holds a run of other settings ({'; '.join(found)}). Name another run_dir, or delete that one."
        )
