"""A whole SeMi step against the bare model, and against eager float32: `python -m benchmarks.step`.

Three loops take turns on the same network (WRN-28-2 on 32 px, 64 labeled images and 64 x (1 weak + 2 strong) views):
  step        the trainer's: pipeline, mixed precision, loss, bank, backward, guard, optimizer, EMA
  model_only  forward, cross-entropy, backward and optimizer on ready tensors of the same size and precision
  eager_fp32  the trainer's step in float32, contiguous memory format, not compiled
`efficiency` = model_only / step; `speedup` = eager_fp32 / step.
`launches` are the operations of a step that is not compiled; on a GPU `recorded_step` replays them as one CUDA graph.
`logged_step` is `step` with all a run does for its log (times, pseudo-label counts, log.jsonl, W&B offline). What
that adds drowns in the noise of a step, so it is timed by itself, too: `logging_share` of a step.

With `--processes N` the loops run in N processes at once, each with its share of the cores (gloo on CPUs, a GPU each
otherwise): `step` and `model_only` with gradients averaged, BatchNorm synchronized and, in `step`, the bank's
candidates gathered; `model_alone` is model_only without any of that, so `communication` = model_alone / model_only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from benchmarks.common import Launches, interleave, report
from benchmarks.logging_cost import Logging
from benchmarks.random_data import CLASSES, SIDE, random_folder
from pipelines import open_loaders, read_info
from semi_fast.config import EmaSettings, OptimSettings
from semi_fast.methods import Out, build_method
from semi_fast.methods.base import compile_parts
from semi_fast.nets import build_net
from semi_fast.processes.launch import keep_buffers
from semi_fast.processes.sync_norm import synchronize_batchnorm
from semi_fast.training.device import choose_compile, image_dtype, make_accelerator
from semi_fast.training.ema import Ema
from semi_fast.training.graph import WARM_UP, StepGraph, make_recorder
from semi_fast.training.guard import Guard
from semi_fast.training.optim import build_optimizer
from semi_fast.training.stages import Stages
from semi_fast.training.step import Trainer, train_step

LABELED, VIEWS, STEPS = 64, 3, 250_000
OPTIM = OptimSettings()


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each loop")
    parser.add_argument("--net", default="wrn28_2")
    parser.add_argument("--processes", type=int, default=1, help="processes that train together")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # what the processes share
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes must be 1 or more, got {arguments.processes}")
    if arguments.folder is not None:
        measure_together(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        random_folder(Path(name))
        if arguments.processes == 1:
            measure_alone(arguments, Path(name))
        else:
            launch(arguments, Path(name))


def measure_alone(arguments: argparse.Namespace, folder: Path) -> None:
    """One process: the three loops, and the JSON line."""
    accel, precision = make_accelerator("auto", None)
    compiled = choose_compile("auto", accel.device, precision.value, 250_000).value
    full, close = trainer_step(folder, arguments.net, accel, precision.value, compiled == "on")
    plain, close_plain = trainer_step(folder, arguments.net, accel, "fp32", False, torch.contiguous_format)
    bare = model_step(arguments.net, accel, precision.value, compiled == "on")
    counted: list[int] = []
    count, close_count = trainer_step(folder, arguments.net, accel, precision.value, False, counted=counted)
    count()
    log: list[Logging] = []
    logged, close_logged = trainer_step(folder, arguments.net, accel, precision.value, compiled == "on", logs=log)
    cases = {"step": full, "logged_step": logged, "model_only": bare, "eager_fp32": plain}
    ends = [close_count, close_logged, close, close_plain]
    if accel.device.type == "cuda":
        recorded, close_recorded = trainer_step(
            folder, arguments.net, accel, precision.value, compiled == "on", graph=True
        )
        cases["recorded_step"] = recorded
        ends.append(close_recorded)
    seconds = interleave(cases, rounds=arguments.rounds, warmup=2 + WARM_UP)
    logging_seconds = log[0].seconds(log[0].last)
    for end in (log[0].close, *ends):
        end()
    report(
        "step",
        {
            "step_ms": 1e3 * seconds["step"],
            "logged_step_ms": 1e3 * seconds["logged_step"],
            "logging_share": logging_seconds / seconds["step"],
            "model_only_ms": 1e3 * seconds["model_only"],
            "efficiency": seconds["model_only"] / seconds["step"],
            "eager_fp32_ms": 1e3 * seconds["eager_fp32"],
            "speedup": seconds["eager_fp32"] / seconds["step"],
            "images_per_s": LABELED * (1 + VIEWS) / seconds["step"],
            **({"recorded_step_ms": 1e3 * seconds["recorded_step"]} if "recorded_step" in seconds else {}),
            "launches": counted[-1],
            "net": arguments.net,
            "precision": precision.value,
            "compile": compiled,
        },
    )


def launch(arguments: argparse.Namespace, folder: Path) -> None:
    """Start the processes, with torchrun's launcher, and wait for them; the first prints the JSON line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
    command += ["-m", "benchmarks.step", f"--rounds={arguments.rounds}", f"--net={arguments.net}"]
    command += [f"--processes={arguments.processes}", f"--folder={folder}"]
    environment = dict(os.environ)
    if torch.cuda.device_count() < arguments.processes:
        environment["ACCELERATE_USE_CPU"] = "true"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.processes)))
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        sys.exit(code)


def measure_together(arguments: argparse.Namespace) -> None:
    """One of several processes: its loops, in step with the others."""
    accel, precision = make_accelerator("auto", None)
    compiled = choose_compile("auto", accel.device, precision.value, 250_000).value
    full, close = trainer_step(arguments.folder, arguments.net, accel, precision.value, compiled == "on")
    together = model_step(arguments.net, accel, precision.value, compiled == "on")
    alone = model_step(arguments.net, accel, precision.value, compiled == "on", together=False)
    cases = {"step": full, "model_only": together, "model_alone": alone}
    seconds = interleave(cases, rounds=arguments.rounds, warmup=2)
    close()
    if accel.is_main_process:
        report(
            "step",
            {
                **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
                "efficiency": seconds["model_only"] / seconds["step"],
                "communication": seconds["model_alone"] / seconds["model_only"],
                "images_per_s": accel.num_processes * LABELED * (1 + VIEWS) / seconds["step"],
                "processes": accel.num_processes,
                "net": arguments.net,
                "precision": precision.value,
                "compile": compiled,
            },
        )
    accel.end_training()


def wrap(accel: Accelerator, model: nn.Module, optim: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as train.py has them in several processes; as they are in one."""
    if accel.num_processes == 1:
        return model, optim
    wrapped, prepared = accel.prepare(model, optim)
    keep_buffers(wrapped)
    return wrapped, prepared


def trainer_step(
    folder: Path,
    name: str,
    accel: Accelerator,
    precision: str,
    compiled: bool,
    layout: torch.memory_format = torch.channels_last,
    logs: list[Logging] | None = None,
    *,
    graph: bool = False,
    counted: list[int] | None = None,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step as train.py makes it, past the warm-up so that every part of the loss is on; and its loaders' close.

    Where `logs` is given, the step is logged, and what logs it is appended there. With `graph` steps are recorded and
    replayed. Where `counted` is given, the launches of each step are appended there, which takes time.
    """
    torch.manual_seed(0)
    device, net = accel.device, build_net(name, bn_momentum=0.001, raw_transitions=False)
    if accel.num_processes > 1:
        synchronize_batchnorm(net, device)
    method = build_method("semi", net, read_info(folder), warmup_epochs=0)
    method = method.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    data = open_loaders(
        folder,
        method.streams,
        batch=LABELED,
        seed=0,
        device=device,
        dtype=image_dtype(precision),
        rank=accel.process_index,
        world=accel.num_processes,
    )
    optim = build_optimizer(method, OPTIM)
    trainer = Trainer(
        method, OPTIM, Stages(method.starts(), STEPS), optim, Ema(method, EmaSettings()), Guard("stop", method, optim)
    )
    if compiled:
        compile_parts(method, "default")
    wrapped, prepared = wrap(accel, method, optim)

    def forward(*step: object) -> Out:
        with autocast(device, precision):
            return wrapped(*step)

    trainer.forward, trainer.update = forward, prepared.step
    if graph:
        trainer.graph = StepGraph(trainer, make_recorder(device), print)
    batches, steps = data.train(), itertools.count()
    if logs is not None:
        logs.append(Logging(folder / "log", method, data, accel))

    def step() -> None:
        batch = next(batches)
        if layout != torch.channels_last:
            batch = batch._replace(images=batch.images.contiguous())
        with nullcontext() if counted is None else Launches() as launches:
            done = train_step(trainer, batch, next(steps))
        if counted is not None:
            counted.append(launches.count)
        if logs is not None:
            logs[0].step(done)

    return step, data.close


def model_step(
    name: str, accel: Accelerator, precision: str, compiled: bool, *, together: bool = True
) -> Callable[[], None]:
    """Forward, cross-entropy, backward and optimizer on ready tensors: what no pipeline or method can go below."""
    torch.manual_seed(0)
    device, backbone = accel.device, build_net(name, bn_momentum=0.001, raw_transitions=False)
    if together and accel.num_processes > 1:
        synchronize_batchnorm(backbone, device)
    model = nn.Sequential(backbone, nn.Linear(backbone.num_features, CLASSES)).to(device)
    x = torch.randn(LABELED * (1 + VIEWS), 3, SIDE, SIDE, device=device, dtype=image_dtype(precision))
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (len(x),), device=device)
    optim = build_optimizer(model, OPTIM)
    if compiled:
        backbone.compile()
    wrapped, prepared = wrap(accel, model, optim) if together else (model, optim)

    def step() -> None:
        with autocast(device, precision):
            logits = wrapped(x)
        F.cross_entropy(logits.float(), y).backward()
        prepared.step()
        prepared.zero_grad(set_to_none=True)

    return step


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context Accelerate puts around the forward."""
    return torch.autocast(
        device.type, torch.bfloat16 if precision == "bf16" else torch.float16, enabled=precision != "fp32"
    )


if __name__ == "__main__":
    main()
