"""Where a run's figures go besides its folder: Weights & Biases, or a stand-in that does nothing."""

from __future__ import annotations

import netrc
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines import Info
from semi_fast.config import Settings
from semi_fast.observe.wandb_run import WandbTracker

CONNECT_SECONDS = 2.0
INIT_SECONDS = 5.0
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


def track_run(settings: Settings, info: Info, folder: Path, *, resumed: bool, say: Callable[[str], None]) -> Tracker:
    """The tracker of a training run: named as its folder, grouped with its other seeds, tagged by what it trains."""
    method = settings.method.name
    return open_tracker(
        settings.wandb,
        project=settings.wandb_project,
        name=folder.name,
        folder=folder,
        config={**settings.model_dump(), "data_name": info.name, "data_fingerprint": info.fingerprint},
        group=f"{info.name}-{method}",
        tags=[info.name, method, settings.net.name, *(["resumed"] if resumed else [])],
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
    say: Callable[[str], None] = print,
) -> Tracker:
    """A W&B run: online when somebody is logged in and the server answers, offline otherwise; `off` gives a no-op.

    Args:
        mode: "auto", "online", "offline" or "off". WANDB_MODE in the environment decides where mode is "auto".
        project, name, config, group, tags: as W&B shows them.
        folder: where W&B keeps its files.
        say: takes one line about what was chosen and why.
    """
    if mode == "auto":
        mode = {"disabled": "off", "dryrun": "offline"}.get(
            os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE", "auto")
        )
    if mode == "off":
        return NoTracker()
    reason = ""
    shown = {"project": project, "name": name, "config": config, "group": group, "tags": list(tags)}
    if mode in ("auto", "online"):
        reason = why_offline()
        if not reason:
            run, reason = _init("online", folder, shown)
            if run is not None:
                say(f"wandb: {run.url}")
                return WandbTracker(run, say)
    run, problem = _init("offline", folder, shown)
    if run is None:
        say(f"wandb: off ({problem})")
        return NoTracker()
    say(
        "wandb: offline"
        + (f" ({reason})" if reason else "")
        + f"; upload later with `wandb sync {folder}/wandb/offline-run-*`"
    )
    return WandbTracker(run, say)


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


def _has_stored_key(host: str) -> bool:
    # `wandb login` keeps the key in the netrc file.
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _init(mode: str, folder: Path, shown: dict[str, Any]) -> tuple[Any, str]:
    import wandb

    settings = wandb.Settings(init_timeout=INIT_SECONDS, silent=True, console="off")
    if "finish_timeout" in wandb.Settings.model_fields:  # older versions wait for a lost server without end
        settings.finish_timeout = FINISH_SECONDS
    try:
        run = wandb.init(mode=mode, dir=str(folder), settings=settings, **shown)  # type: ignore[arg-type]
    except (wandb.errors.CommError, wandb.errors.UsageError, OSError) as error:
        return None, " ".join(str(error).split())
    return run, ""
