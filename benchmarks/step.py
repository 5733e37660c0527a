"""A whole SeMi step against the bare model, and against eager float32: `python -m benchmarks.step`.

Loops take turns on the same network (WRN-28-2 on 32 px, 64 labeled images and 64 x (1 weak + 2 strong) views):
  step        the trainer's: pipeline, mixed precision, loss, bank, backward, guard, optimizer, EMA
  model only  forward, cross-entropy, backward and optimizer on ready tensors of the same size and precision
  eager fp32  the trainer's step in float32, contiguous memory format, not compiled
  matmul      a product of two square matrices of that precision, large enough to reach what the device can do
  logging     what a run does for its log (times, pseudo-label counts, log.jsonl, W&B offline), by itself: that drowns
              in the noise of a step
  step in parts  the step with a stopwatch around its parts, which takes a little time itself
The ratio `efficiency` is model only / step, `speedup` eager fp32 / step, `logging` logging / step; `of peak`, the
floating-point operations a second of the model's passes in `step` over those of `matmul`; `beside the model`, the part
of `step in parts` that is neither network nor optimizer. `parts` has each one's microseconds, in its fastest turn.
`launches` are the operations of a step that is not compiled; on a GPU `recorded step` replays them as one CUDA graph.

With `--processes N` the loops run in N processes at once, each with its share of the cores (gloo on CPUs, a GPU each
otherwise): `step` and `model only` with gradients averaged, BatchNorm synchronized and, in `step`, the bank's
candidates gathered; `model alone` is model only without any of that, so `communication` = model alone / model only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Launches, fastest, in_turns, options, report, timed
from benchmarks.logging_cost import WINDOW, Logging
from benchmarks.random_data import CLASSES, SIDE, random_folder
from benchmarks.step_parts import Parts
from pipelines import open_loaders, read_info
from semi_fast.config import EmaSettings, OptimSettings
from semi_fast.methods import Out, build_method
from semi_fast.methods.base import compile_parts
from semi_fast.nets import build_net
from semi_fast.processes.launch import keep_buffers
from semi_fast.processes.sync_norm import synchronize_batchnorm
from semi_fast.training.device import choose_compile, image_dtype, make_accelerator
from semi_fast.training.ema import Ema
from semi_fast.training.graph import StepGraph, make_recorder
from semi_fast.training.guard import Guard
from semi_fast.training.optim import build_optimizer
from semi_fast.training.stages import Stages
from semi_fast.training.step import Trainer, train_step

LABELED, VIEWS, STEPS = 64, 3, 250_000
TURN = 0.2  # seconds of a loop in a turn: by then batches that waited since its last turn are used up
MATRIX = 2048  # rows and columns of what is multiplied for the device's peak
OPTIM = OptimSettings()


def main() -> None:
    """Measure and print the JSON line."""
    parser = options(__doc__, rounds=40, seconds=90)
    parser.add_argument("--net", default="wrn28_2")
    parser.add_argument("--side", type=int, default=SIDE, help="height and width in pixels")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--threads", type=int, help="of a process (default: its share of the cores)")
    parser.add_argument("--processes", type=int, default=1, help="processes that train together")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # what the processes share
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes must be 1 or more, got {arguments.processes}")
    if arguments.folder is not None:
        measure_together(arguments, *made(arguments))
        return
    with tempfile.TemporaryDirectory() as name:
        random_folder(Path(name), side=arguments.side)
        if arguments.processes == 1:
            measure_alone(arguments, Path(name), *made(arguments))
        else:
            launch(arguments, Path(name))


def made(arguments: argparse.Namespace) -> tuple[Accelerator, str, bool]:
    """The device, the precision, and whether to compile, as a long run has them."""
    accel, precision = make_accelerator(arguments.precision, arguments.threads)
    return accel, precision.value, choose_compile(arguments.compile, accel.device, precision.value, STEPS).value == "on"


def measure_alone(
    arguments: argparse.Namespace, folder: Path, accel: Accelerator, precision: str, compiled: bool
) -> None:
    """One process: the loops, and the JSON line."""
    net, side = arguments.net, arguments.side
    counted: list[int] = []
    log: list[Logging] = []
    counting, *ends = trainer_step(folder, net, accel, precision, False, counted=counted, logs=log)
    counting()
    step, close = trainer_step(folder, net, accel, precision, compiled)
    plain, close_plain = trainer_step(folder, net, accel, "fp32", False, torch.contiguous_format)
    loops = {"step": step, "model only": model_step(net, side, accel, precision, compiled), "eager fp32": plain}
    ends += [close, close_plain]
    if accel.device.type == "cuda":
        loops["recorded step"], close = trainer_step(folder, net, accel, precision, compiled, graph=True)
        ends.append(close)
    cases = {name: timed(loop, least=TURN) for name, loop in loops.items()}
    parts: list[Parts] = []
    apart, close = trainer_step(folder, net, accel, precision, compiled, parts=parts)
    cases["step in parts"] = parts[0].turn(apart, TURN)
    ends.append(close)
    cases["matmul"] = timed(product(accel.device, precision), least=TURN)
    cases["logging"] = timed(lambda: log[0].window(log[0].last), of=WINDOW)
    with FlopCounterMode(display=False) as flops:
        model_step(net, side, accel, precision, False)()
    times = in_turns(cases, arguments.rounds, arguments.seconds)
    for end in (log[0].close, *ends):
        end()
    took = {name: fastest(values) for name, values in times.items()}
    ratios = {
        "efficiency": took["model only"] / took["step"],
        "speedup": took["eager fp32"] / took["step"],
        "logging": took["logging"] / took["step"],
        "beside the model": parts[0].beside_model(),
        "of peak": flops.get_total_flops() / took["step"] / (2 * MATRIX**3 / took["matmul"]),
    }
    facts: dict[str, Any] = {"net": net, "side": side, "precision": precision, "compile": compiled}
    facts["launches"] = counted[-1]
    facts["parts"] = {part: float(f"{1e6 * least:.4g}") for part, least in parts[0].fastest().items()}
    report("step", ratios, times, "step", **facts)


def product(device: torch.device, precision: str) -> Callable[[], object]:
    """Multiply two large matrices."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=device, dtype=image_dtype(precision))
    return lambda: a @ b


def launch(arguments: argparse.Namespace, folder: Path) -> None:
    """Start the processes, with torchrun's launcher, and wait for them; the first prints the JSON line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
    command += ["-m", "benchmarks.step", *sys.argv[1:], f"--folder={folder}"]
    environment = dict(os.environ)
    if torch.cuda.device_count() < arguments.processes:
        environment["ACCELERATE_USE_CPU"] = "true"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.processes)))
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        sys.exit(code)


def measure_together(arguments: argparse.Namespace, accel: Accelerator, precision: str, compiled: bool) -> None:
    """One of several processes: its loops, in step with the others: so many calls, however long they take."""
    net, side = arguments.net, arguments.side
    step, close = trainer_step(arguments.folder, net, accel, precision, compiled)
    loops = {
        "step": step,
        "model only": model_step(net, side, accel, precision, compiled),
        "model alone": model_step(net, side, accel, precision, compiled, together=False),
    }
    times = in_turns({name: timed(loop) for name, loop in loops.items()}, arguments.rounds)
    close()
    if accel.is_main_process:
        took = {name: fastest(values) for name, values in times.items()}
        ratios = {
            "efficiency": took["model only"] / took["step"],
            "communication": took["model alone"] / took["model only"],
        }
        facts = {"net": net, "side": side, "precision": precision, "compile": compiled}
        report("step", ratios, times, "step", processes=accel.num_processes, **facts)
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
    parts: list[Parts] | None = None,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step as train.py makes it, past the warm-up so that every part of the loss is on; and its loaders' close.

    Where `logs` is given, the step is logged, and what logs it is appended there. With `graph` steps are recorded and
    replayed. Where `counted` is given, the launches of each step are appended there, which takes time.
    Where `parts` is given, what times the step's parts is appended there, which takes a little time as well.
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
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext
    if parts is not None:
        parts.append(Parts(trainer))
        phase = parts[0].phase
    if logs is not None:
        logs.append(Logging(folder / "log", method, data, accel))

    def step() -> None:
        with phase("the rest"):
            with phase("batch"):
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
    name: str, side: int, accel: Accelerator, precision: str, compiled: bool, *, together: bool = True
) -> Callable[[], None]:
    """Forward, cross-entropy, backward and optimizer on ready tensors: what no pipeline or method can go below."""
    torch.manual_seed(0)
    device, backbone = accel.device, build_net(name, bn_momentum=0.001, raw_transitions=False)
    if together and accel.num_processes > 1:
        synchronize_batchnorm(backbone, device)
    model = nn.Sequential(backbone, nn.Linear(backbone.num_features, CLASSES)).to(device)
    x = torch.randn(LABELED * (1 + VIEWS), 3, side, side, device=device, dtype=image_dtype(precision))
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
