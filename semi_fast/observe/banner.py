"""What a run prints before it starts, and the help text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel

from pipelines import VIEWS, Loaders
from semi_fast.config import CONFIGS, PROTOCOL, NetSettings, OptimSettings, Settings
from semi_fast.methods import Method, check_options, method_names
from semi_fast.training.device import Choice


def describe(
    cfg: Settings,
    data: Loaders,
    method: Method,
    accel: Accelerator,
    precision: Choice,
    compiled: Choice,
    graph: Choice,
) -> str:
    """The resolved run in a few lines: data, method, network, device, each automatic choice with its reason."""
    info = data.info
    device = (
        torch.cuda.get_device_name(accel.device)
        if accel.device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    processes = f", {accel.num_processes} processes" if accel.num_processes > 1 else ""
    options = ", ".join(f"{key}={value}" for key, value in cfg.method.options.items())
    mode = f", mode {cfg.compile.mode}" if compiled.value == "on" and cfg.compile.mode != "default" else ""
    views = " + ".join(f"{group.rows} {group.view} views ({group.stream})" for group in data.sizes.groups)
    held_out = f"{info.num_test:,} test" + (f", {info.num_validation:,} validation" if info.num_validation else "")
    lines = {
        "data": f"{cfg.data.path}: {info.num_classes} classes, {info.num_labeled:,} labeled, "
        f"{info.num_unlabeled:,} unlabeled, {held_out} images of {info.resolution} px; "
        f"back end {data.backend} ({data.reason})",
        "method": f"{cfg.method.name}" + (f" ({options})" if options else ""),
        "network": network_line(cfg.net, sum(p.numel() for p in method.net.parameters())),
        "training": f"{cfg.steps:,} steps of {views}, seed {cfg.seed}",
        "optimizer": optimizer_line(cfg.optim),
        "averages": f"decay {cfg.ema.decay}{' after a warm-up' if cfg.ema.warmup else ''}, "
        f"BatchNorm statistics {cfg.ema.buffers}",
        "protocol": cfg.protocol or "none: the settings are this run's own",
        "device": f"{device}{processes}",
        "precision": f"{precision.value} ({precision.reason})",
        "compile": f"{compiled.value}{mode} ({compiled.reason})",
        "graph": f"{'whole steps' if graph.value == 'step' else 'off'} ({graph.reason})",
    }
    return "\n".join(f"{key + ':':<11}{line}" for key, line in lines.items())


def network_line(net: NetSettings, parameters: int) -> str:
    """What of the network's settings has an effect."""
    parts = [
        f"{net.name}, {parameters / 1e6:.2f} M parameters, BatchNorm momentum {net.bn_momentum}",
        "small stem" if net.stem == "small" else "",
        "normalized as for its weights" if net.structure()["normalize"] == "weights" else "",
        f"first {net.freeze} groups frozen" if net.freeze else "",
        "gradient checkpointing" if net.checkpointing else "",
    ]
    return ", ".join(part for part in parts if part)


def optimizer_line(optim: OptimSettings) -> str:
    """What of the optimizer's settings has an effect."""
    sgd = optim.name in ("sgd", "muon")
    parts = [
        f"lr {optim.lr} {optim.schedule}" + (f" {optim.milestones}" if optim.milestones else ""),
        f"warm-up over {100 * optim.warmup:g}% of the steps" if optim.warmup else "",
        f"{'Nesterov ' if sgd and optim.nesterov else ''}{'momentum' if sgd else 'first beta'} {optim.momentum}",
        f"weight decay {optim.weight_decay}{' on biases and BatchNorm, too' if optim.decay_all else ''}",
        f"shrink {optim.shrink}" if optim.shrink else "",
        f"layer decay {optim.layer_decay}" if optim.layer_decay < 1 else "",
    ]
    return f"{optim.name}: {', '.join(part for part in parts if part)}"


def help_text(head: str) -> str:
    """The command's help: usage, setting files, protocols, every setting with its default, all options of methods."""
    files = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    lines = [
        head.strip(),
        "",
        "Setting files: " + ", ".join(name for name in files if not name.startswith(PROTOCOL)),
        "Protocols, which go behind one of them: " + ", ".join(name for name in files if name.startswith(PROTOCOL)),
        "Policies, for views.weak=NAME and views.strong=NAME: " + ", ".join(VIEWS),
        "",
        "Settings:",
    ]
    lines += [f"  {line}" for line in _settings(Settings, "")]
    for name in method_names():
        lines += ["", f"Options of method={name}:"]
        lines += [f"  method.{key}={value}" for key, value in check_options(name, {}).items()] or ["  none"]
    return "\n".join(lines)


def _settings(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _settings(inner, f"{prefix}{name}.")
        else:
            default: Any = "none" if field.default is None else field.default
            yield f"{prefix + name + '=' + str(default):<34} {field.description or ''}".rstrip()
