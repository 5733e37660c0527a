"""Figures of the log: accuracy, losses, throughput, pseudo-labels (Figure 6), what the method declares, and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semi_fast.observe.metrics import EASY_FROM, symbol
from semi_fast.parts.figures import Figure as Declared
from semi_fast.reporting.drawing import INK, MUTED, SERIES, Figure, figure, line, log_scale, short
from semi_fast.reporting.runlog import Entry, RunLog, series

KINDS = (
    f"Easy: in use, with a confidence of {EASY_FROM} or more. Hard: in use, below that. "
    "Ultra-hard: not in use, its confidence is below the threshold."
)
WHOLE = ("time/step_ms", "time/slowest_step_ms")  # of a step rather than of a part of it
REST = "the rest"
GROUPS = {"many": SERIES[0], "medium": SERIES[4], "few": SERIES[1]}
LIMITS: dict[str, tuple[float | None, float | None]] = {"share": (0, 1.02)}  # of the axis, by the unit declared


class Curve(NamedTuple):
    """A line of a figure: points (n,) and how to draw it."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    color: str
    style: Mapping[str, Any]


def curve(entries: Sequence[Entry], key: str, name: str, color: str, scale: float = 1.0, **style: Any) -> Curve | None:
    """The curve of a logged figure, or None where the log has no finite value of it."""
    x, y = series(entries, key)
    return Curve(name, x, scale * y, color, style) if np.isfinite(y).any() else None


def over_steps(
    name: str,
    title: str,
    curves: Sequence[Curve | None],
    unit: str,
    *,
    limits: tuple[float | None, float | None] = (None, None),
    log: bool = False,
    caption: str = "",
) -> Figure | None:
    """A figure of curves over the training steps; None where there is none to draw.

    limits: of the y axis, None where the data decide.
    """
    shown = [c for c in curves if c is not None]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for c in shown:
            y = np.where(c.y > 0, c.y, np.nan) if log else c.y
            line(axes, c.x, y, c.color, label=c.name or None, **c.style)
        if log and any((c.y > 0).any() for c in shown):
            log_scale(axes)
        axes.set_xlim(0, 1.01 * max(1, *(c.x[-1] for c in shown)))
        axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.set_xlabel("step", labelpad=2)
        axes.set_title(unit)

    rows = [(c.name or title, int(x), y) for c in shown for x, y in zip(c.x, c.y, strict=True)]
    return figure(name, title, draw, ("line", "step", unit), rows, caption=caption)


def accuracy_figures(evaluations: Sequence[Entry], reported: str) -> list[Figure | None]:
    """Accuracy of every prediction, by averaged and raw weights; accuracy of the class groups of the reported one."""
    keys = dict.fromkeys(key for entry in evaluations for key in entry)
    names = [key.split("/") for key in keys if key.count("/") == 3 and key.endswith("/accuracy")]
    colors = dict(zip(dict.fromkeys(head for _, _, head, _ in names), SERIES * 3, strict=False))
    curves = []
    for _, weights, head, _ in names:
        style: dict[str, Any] = {"lw": 2.4 if f"{weights}/{head}" == reported else 1.4}
        if weights == "raw":
            style["ls"] = (0, (3, 2))
        text = f"{head}, raw" if weights == "raw" else head
        curves.append(curve(evaluations, f"eval/{weights}/{head}/accuracy", text, colors[head], **style))
    validation = curve(evaluations, "validation/accuracy", "validation", MUTED, lw=1.4, ls=":")
    groups = [curve(evaluations, f"eval/{reported}/{name}", name, color) for name, color in GROUPS.items()]
    caption = "Averaged weights (EMA); dashed: the raw weights. The thick line is the one that is reported; "
    caption += "those that are not are measured at the end."
    caption += " Dotted: the reported one on validation images, by which the best is chosen." if validation else ""
    thirds = "Mean accuracy of the classes with the most, the middling and the fewest labeled images, a third each."
    return [
        over_steps("accuracy", "Test accuracy", [*curves, validation], "% of the test images", caption=caption),
        over_steps("groups", "Frequent and rare classes", groups, "%, mean of the classes", caption=thirds),
    ]


def loss_figures(train: Sequence[Entry], names: Sequence[str]) -> list[Figure | None]:
    """The loss and its parts, and the learning rate."""
    parts = [n for n in names if n.startswith("loss/")]
    curves = []
    for number, key in enumerate(parts):
        name = key.removeprefix("loss/").replace("_", " ")
        color = INK if name == "total" else SERIES[(number - 1) % len(SERIES)]
        curves.append(curve(train, key, name, color, lw=2.2 if name == "total" else 1.4))
    rate = [curve(train, "optim/lr", "", SERIES[5])]
    return [
        over_steps("losses", "Loss and its parts", curves, "mean of a log window, logarithmic", log=True),
        over_steps("learning_rate", "Learning rate", rate, "", limits=(0, None)),
    ]


def throughput_figures(train: Sequence[Entry]) -> list[Figure | None]:
    """Images a second over training; as a share of the bare model's; waiting, evaluating, memory, the GPU's load."""

    rate = curve(train, "throughput/images_per_s", "", SERIES[0])
    median = float(np.nanmedian(rate.y)) if rate else 0.0
    dashes = {"lw": 1, "ls": (0, (2, 2))}
    middle = Curve(f"median {median:,.0f}", rate.x, np.full_like(rate.y, median), MUTED, dashes) if rate else None
    ceiling = curve(train, "throughput/ceiling_share", "", SERIES[2], 100)
    caption = "The bare model was timed once, at the start."
    if ceiling is not None and np.nanmax(ceiling.y) > 100:
        caption += " More than 100% means that other work slowed the machine while it was: these shares are too high."
    wait = curve(train, "time/data_wait_share", "", SERIES[1], 100)
    evaluation = curve(train, "time/evaluation_share", "", SERIES[4], 100)
    memory = [curve(train, f"memory/{name}_mb", name, SERIES[i]) for i, name in enumerate(("host", "device"))]
    load = curve(train, "gpu/utilization", "", SERIES[3])
    bare = "% of the bare model's images a second"
    return [
        over_steps("throughput", "Throughput", [rate, middle], "images through the network a second", limits=(0, None)),
        over_steps("data_wait", "Waiting for data", [wait], "% of the time of training", limits=(0, None)),
        over_steps("evaluation", "Evaluating", [evaluation], "% of the session's time so far", limits=(0, None)),
        over_steps("ceiling", "Share of the ceiling", [ceiling], bare, limits=(0, None), caption=caption),
        over_steps("memory", "Memory in use", memory, "MiB", limits=(0, None)),
        over_steps("gpu", "Load of the GPU", [load], "%", limits=(0, 100)),
    ]


def pseudo_figures(train: Sequence[Entry]) -> list[Figure | None]:
    """Figure 6: how many of the pseudo-labels in use are right, and how hard the unlabeled images are."""
    right = [curve(train, "pseudo/accuracy", "all", INK, lw=2.4)]
    right += [curve(train, f"pseudo/accuracy_{name}", name, color) for name, color in GROUPS.items()]
    kinds = [
        curve(train, "pseudo/easy", "easy", SERIES[2], 100),
        curve(train, "pseudo/hard", "hard", SERIES[4], 100),
        curve(train, "pseudo/ultra_hard", "ultra-hard", SERIES[1], 100),
    ]
    return [
        over_steps("pseudo_accuracy", "Pseudo-labels that are right", right, "% of those in use", limits=(None, 101)),
        over_steps("pseudo_kinds", "Easy, hard, ultra-hard", kinds, "% of the unlabeled images", caption=KINDS),
    ]


def declared_figures(train: Sequence[Entry], declared: Sequence[Declared]) -> list[Figure | None]:
    """What the method declares and the log has, those of one group and unit together: "bank/fill" is of group bank."""
    together: dict[tuple[str, str], list[Declared]] = {}
    for one in declared:
        if one.unit != "distribution" and np.isfinite(series(train, one.name)[1]).any():
            together.setdefault((one.name.partition("/")[0], one.unit), []).append(one)
    drawn = []
    for (group, unit), members in together.items():
        names = [words(one.name.removeprefix(f"{group}/")) for one in members]
        shown = zip(members, names, SERIES * 3, strict=False)
        curves = [curve(train, one.name, name, color) for one, name, color in shown]
        caption = " ".join(f"{name}: {one.meaning}" for name, one in zip(names, members, strict=True))
        title = words(group if len(members) > 1 else members[0].name).capitalize()
        limits = LIMITS.get(unit, (None, None))
        name = f"method_{group}_{unit or 'number'}"
        drawn.append(over_steps(name, title, curves, symbol(members[0]), limits=limits, caption=caption))
    return drawn


def words(name: str) -> str:
    """A part of a logged name for people: "confidence_q10" -> "confidence q10"."""
    return name.replace("_", " ").replace("/", " ")


def time_figures(log: RunLog) -> list[Figure | None]:
    """Mean milliseconds of a step by part, and seconds of the run by what was done, training steps among it."""

    def values(unit: str, reduce: Callable[[Any], Any]) -> dict[str, float]:
        names = [name for name in log.names("time/") if name.endswith(unit) and name not in WHOLE]
        logged = {words(n.removeprefix("time/").removesuffix(unit)): series(log.train, n)[1] for n in names}
        return {name: float(reduce(numbers)) for name, numbers in logged.items() if np.isfinite(numbers).any()}

    parts, between = values("_ms", np.nanmean), values("_s", np.nansum)
    steps = series(log.train, "time/step_ms")[1]
    if np.isfinite(steps).any():
        step = float(np.nanmean(steps))
        parts |= {REST: step - sum(parts.values())} if parts and step > sum(parts.values()) else {}
        between = {"training steps": step * log.last_step / 1000, **between} if between else {}
    return [
        _bars("time_parts", "Where a step's time goes", parts, "ms", "Mean over the log."),
        _bars("time_run", "Where the run's time goes", between, "s", "Sums over the log."),
    ]


def _bars(name: str, title: str, parts: dict[str, float], unit: str, caption: str) -> Figure | None:
    if len(parts) < 2:
        return None
    total = max(sum(parts.values()), 1e-12)
    colors = [MUTED if part == REST else color for part, color in zip(parts, SERIES * 2, strict=False)]

    def draw(axes: Any) -> None:
        bars = axes.barh(list(parts), list(parts.values()), 0.62, color=colors)
        axes.bar_label(bars, [f"{v:,.3g} {unit}   {100 * v / total:.0f}%" for v in parts.values()], padding=7)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    rows = [(part, value, 100 * value / total) for part, value in parts.items()]
    header = ("part", unit, "percent")
    return figure(name, title, draw, header, rows, caption=caption, height=20 + 30 * len(parts))
