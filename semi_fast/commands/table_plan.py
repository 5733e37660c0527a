"""What a table would run, and how long that would take on this machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from pipelines.batch import Info, Sizes
from semi_fast.commands.sweep import Cell, choose_devices, finished
from semi_fast.config import Settings, flatten, read_run_config
from semi_fast.methods import build_method
from semi_fast.methods.base import Method
from semi_fast.nets import build_net
from semi_fast.observe.ceiling import measure_ceiling
from semi_fast.run.saved import run_facts
from semi_fast.run.summary import read_summary
from semi_fast.training.device import choose_precision, image_dtype, use_cores
from semi_fast.training.stages import Stages, images_left

TIMED = 16  # images that a CPU is timed with: its rate hardly depends on their number
Kind = tuple[str, ...]  # of runs whose steps take equally long


def print_plan(
    cells: Sequence[Cell], builds: Sequence[Sequence[str]], out: Path, devices: str, sides: Mapping[str, int]
) -> None:
    """Print the commands with the hours of each, and where these come from.

    Args:
        cells: all runs of the table. builds: arguments of Python that build data folders.
        out: where finished runs may lie. devices: see `choose_devices`.
        sides: of the images in pixels, by data folder.
    """
    gpus = choose_devices(devices)
    known, rates = seconds_of_finished(out), dict[tuple[str, int], float]()
    hours, alone = 0.0, 0
    for arguments in builds:
        print("build       ", shlex.join(["python", *arguments]))
    open_cells = [cell for cell in cells if not finished(cell)]
    for cell in open_cells:
        s, side = cell.settings, sides[cell.settings.data.path]
        kind = kind_of(cell.folder, flatten(s.model_dump()), side)
        if kind in known:
            seconds, mark = fmean(known[kind]) * s.steps, " "
        else:
            if (s.net.name, side) not in rates:
                rates[s.net.name, side] = network_rate(s, side, bool(gpus))
            method, sizes = method_and_sizes(s, side)
            images = images_left(method, sizes, Stages(method.starts(), s.steps), 0)
            seconds, mark = images / rates[s.net.name, side], "*"
            alone += 1
        hours += seconds / 3600
        command = shlex.join(["python", "-m", "semi_fast.train", *cell.arguments])
        print(f"{seconds / 3600:9,.2f} h{mark}", command, flush=True)
    name = torch.cuda.get_device_name() if gpus else f"the CPU with {use_cores(None, 1)} threads"
    at_once = max(1, len(gpus))
    print(
        f"{len(open_cells)} runs to train, {len(cells) - len(open_cells)} finished; {hours:,.2f} hours on {name}"
        + (f", {hours / at_once:,.2f} with {at_once} GPUs at work" if at_once > 1 else "")
        + ". Without building the data."
    )
    if alone < len(open_cells):
        print(f"{len(open_cells) - alone} by the time a step took in finished runs of the same row in {out}.")
    if alone:
        found = ", ".join(f"{net} at {side} px {rate:,.0f} images/s" for (net, side), rate in rates.items())
        print(
            f"{alone} (*) by the rate of the network alone, measured just now, not compiled: {found}. What the method "
            "computes besides, evaluations and checkpoints come on top; compiling may take some off."
        )


def seconds_of_finished(out: Path) -> dict[Kind, list[float]]:
    """Wall seconds a step of the finished runs below a folder of tables."""
    known: dict[Kind, list[float]] = {}
    for file in sorted(out.glob("*/*/summary.json")):
        summary, config = read_summary(file.parent), read_run_config(file.parent)
        if summary is not None:
            side = run_facts(file.parent, str(config["data"]["path"])).info.resolution
            known.setdefault(kind_of(file.parent, flatten(config), side), []).append(summary.seconds / summary.steps)
    return known


def kind_of(folder: Path, config: Mapping[str, object], side: int) -> Kind:
    """What decides how long a step takes: the row, which the folder names, network, images a step and their size."""
    row = folder.name.rpartition("-seed")[0]
    return (row, *(str(config.get(key)) for key in ("net.name", "batch", "mu")), str(side))


def method_and_sizes(settings: Settings, side: int) -> tuple[Method, Sizes]:
    """The method, and the sizes of its batches in one process."""
    info = _any_info(side)  # streams follow from the options alone
    net = build_net(**settings.net.structure(), info=info)
    method = build_method(settings.method.name, net, info, **settings.method.options)
    return method, Sizes(method.streams, settings.batch, settings.mu, 1)


def _any_info(side: int) -> Info:
    two, three = (2, 2), (0.5, 0.5, 0.5)
    return Info("", 2, ("a", "b"), side, two, three, three, 8, 4, 4, 1, "")


def network_rate(settings: Settings, side: int, on_gpu: bool) -> float:
    """Images a second through the network alone, training, by the precision of the run; see `measure_ceiling`."""
    device = torch.device("cuda" if on_gpu else "cpu")
    precision = choose_precision(settings.precision, device).value
    use_cores(settings.threads, 1)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = partial(torch.autocast, device.type, dtypes[precision]) if precision in dtypes else nullcontext
    count = method_and_sizes(settings, side)[1].images_per_step if on_gpu else TIMED
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = images.to(device, image_dtype(precision), memory_format=torch.channels_last)
    net = build_net(**settings.net.structure(), info=_any_info(side)).to(device)
    return measure_ceiling(net, 10, images, settings.optim, autocast)
