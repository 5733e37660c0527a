"""Where a run's figures go besides its folder: Weights & Biases, or a stand-in that does nothing."""

from __future__ import annotations

import netrc
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.files import replacing
from pipelines import Info
from semi_fast.config import Settings
from semi_fast.observe.wandb_run import WandbTracker

ID = "wandb-id"  # in a run's folder: the id of its run at W&B, the same in every session
CONNECT_SECONDS = 2.0
INIT_SECONDS = 5.0
WRITE_SECONDS = 0.2  # between two writes of an offline run: what a killed process loses of it
FINISH_SECONDS = 120.0  # for what is still to be uploaded at the end; the rest stays in the run's folder


class NoTracker:
    """Takes what a WandbTracker takes and keeps nothing: `wandb=off`, and every process but the first."""

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record nothing."""

    def publish(self, summary: dict[str, Any], info: Info, unlabeled: Sequence[int] | None, folder: Path) -> None:
        """Record nothing."""

    def finish(self) -> None:
        """Close nothing."""


Tracker = WandbTracker | NoTracker


def track_run(
    settings: Settings, info: Info, folder: Path, *, resumed: bool, logged: int, say: Callable[[str], None]
) -> Tracker:
    """The tracker of a training run: named as its folder, grouped with its other seeds, tagged by what it trains.

    Args:
        resumed: whether it goes on from a checkpoint: then it goes on at W&B, too.
        logged: the last step that the session before logged.
    """
    method = settings.method.name
    return open_tracker(
        settings.wandb,
        project=settings.wandb_project,
        name=folder.name,
        folder=folder,
        config={**settings.model_dump(), "data_name": info.name, "data_fingerprint": info.fingerprint},
        group=f"{info.name}-{method}",
        tags=[info.name, method, settings.net.name, *(["resumed"] if resumed else [])],
        logged=logged if resumed else None,
        say=say,
    )


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
        return NoTracker()
    known = logged is not None and (folder / ID).exists()
    try:
        identity = (folder / ID).read_text() if known else _new_id(folder)
    except OSError as error:
        say(f"wandb: off ({folder / ID}: {error.strerror})")
        return NoTracker()
    done = logged if known and logged else 0
    reason = ""
    shown = {"project": project, "name": name, "config": config, "group": group, "tags": list(tags), "id": identity}
    if mode in ("auto", "online"):
        reason = why_offline()
        if not reason:
            run, reason = _init("online", folder, shown)
            if run is not None:
                say(f"wandb: {run.url}")
                return WandbTracker(run, say, run.step - 1 if run.resumed else done)  # the server knows best
    run, problem = _init("offline", folder, shown)
    if run is None:
        say(f"wandb: off ({problem})")
        return NoTracker()
    say(
        "wandb: offline"
        + (f" ({reason})" if reason else "")
        + f"; upload later with `wandb sync {folder}/wandb/offline-run-*`"
    )
    return WandbTracker(run, say, done)


def why_offline() -> str:
    """Why an online run cannot be started: nobody is logged in, or the server does not answer. "" when it can.

    A plain connection attempt of at most four seconds comes first, because W&B's own start can block far longer.
    """
    import wandb

    base = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    if not (os.environ.get("WANDB_API_KEY") or _has_stored_key(urlsplit(base).hostname or "")):
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


def _new_id(folder: Path) -> str:
    identity = secrets.token_hex(8)
    with replacing(folder / ID) as file:
        file.write(identity.encode())
    return identity


def _has_stored_key(host: str) -> bool:
    # `wandb login` keeps the key in the netrc file.
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
