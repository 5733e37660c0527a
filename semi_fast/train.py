"""Train a classifier: `accelerate launch semi_fast/train.py [CONFIG] [key=value ...]`.

CONFIG is a file of configs/, by name or path; without it, `digits_lt`, whose data set is built where it is missing.
`accelerate launch semi_fast/train.py --help` lists every setting.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # all that imports make stays: looking for garbage among it takes a fifth of their time
    gc.disable()

from accelerate import Accelerator
from accelerate.utils import set_seed

from data_prep.errors import UserError
from pipelines import Info, open_loaders, read_info
from pipelines.reading import read_facts
from semi_fast.config import Settings, load_settings, with_change
from semi_fast.digits import build_missing_digits
from semi_fast.memory_bank import MemoryBank
from semi_fast.methods import Method, build_method
from semi_fast.methods.base import compile_parts
from semi_fast.nets import build_net, depth_groups
from semi_fast.nets.weights import PRETRAINED, check_file, load_weights
from semi_fast.observe.banner import describe, help_text
from semi_fast.observe.console import Console
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.processes.launch import is_loss_of_a_process, process_name, rank, speaks_for
from semi_fast.processes.sync_norm import synchronize_batchnorm
from semi_fast.reporting import report_at_end
from semi_fast.run.run import Run
from semi_fast.run.saved import fit_start, load_start
from semi_fast.run.summary import Summary
from semi_fast.training.device import choose_compile, choose_graph, image_dtype, make_accelerator
from semi_fast.training.ema import Ema
from semi_fast.training.graph import StepGraph, make_recorder
from semi_fast.training.guard import Guard
from semi_fast.training.look import RunLook
from semi_fast.training.optim import build_optimizer
from semi_fast.training.stages import Stages
from semi_fast.training.step import Trainer, train_step
from semi_fast.training.stopping import StoppedError


def main(argv: Sequence[str]) -> Summary:
    """Train as the command line says and return the run's summary.

    Raises: UserError for what the user can put right; StoppedError when SIGTERM or Ctrl-C ended the run early.
    """
    cfg = load_settings(argv)
    accel, precision = make_accelerator(cfg.precision, cfg.threads)
    cfg = load_settings(argv, accel.num_processes)  # again: whether a protocol is followed depends on their number
    info = read_data_info(cfg, accel)
    cfg = heed_split(heed_weights(cfg))
    method = make_method(cfg, info).to(accel.device)
    for bank in (module for module in method.modules() if isinstance(module, MemoryBank)):
        bank.check_device()
    if accel.num_processes > 1:
        synchronize_batchnorm(method, accel.device)
    compiled = choose_compile(cfg.compile.use, accel.device, precision.value, cfg.steps)
    graph = choose_graph(cfg.compile.graph, accel, cfg.compile.mode if compiled.value == "on" else "")
    stopwatch = Stopwatch(accel.device)

    # The loaders are not prepared by Accelerate: they shard by rank themselves.
    data = open_loaders(
        cfg.data.path,
        method.streams,
        batch=cfg.batch,
        mu=cfg.mu,
        seed=cfg.seed,
        device=accel.device,
        dtype=image_dtype(precision.value),
        backend=cfg.data.backend,
        policies=cfg.views.policies(),
        rank=accel.process_index,
        world=accel.num_processes,
        phase=stopwatch.phase,
    )
    if method.relabels and data.backend == "dali":
        raise UserError(
            f"The back end dali serves the labels that were built, and method={cfg.method.name} changes them on its "
            "way. Set data.backend=resident or ffcv."
        )
    run = Run(cfg, accel, info, stopwatch)
    try:
        run.say(describe(cfg, data, method, accel, precision, compiled, graph))
        trainer = make_trainer(cfg, accel, method, stopwatch)
        look = RunLook(trainer, data, accel.process_index, lambda: make_method(cfg, info, run.say), accel.autocast)
        start = run.resume(trainer, data, look)
        if start == 0 and (cfg.start_from or cfg.net.weights):
            trainer.restart(0, make_method(cfg, info, run.say))
        run.open(start)
        if compiled.value == "on":
            compile_parts(method, cfg.compile.mode)
        trainer.prepare(accel)
        if graph.value == "step":
            trainer.graph = StepGraph(trainer, make_recorder(accel.device), run.say)
        run.watch(compiled.value == "on")

        batches = data.train(start, run.loader_state)
        with run.stop.listening():
            for step in range(start, cfg.steps):
                batches = run.begin_stage(step, batches)
                with stopwatch.phase("data_wait"):
                    batch = next(batches)
                run.take(train_step(trainer, batch, step))
                run.tick(step + 1)  # log, evaluate, save when due: the only host syncs
        summary = run.finish()
        if accel.is_main_process:
            report_at_end(run.folder, cfg.report, cfg.steps, run.say)
        run.close(summary)
        return summary
    finally:
        run.console.close()
        data.close()


def read_data_info(cfg: Settings, accel: Accelerator) -> Info:
    """Classes, counts, mean, std: all from the manifest. Builds the embedded set where it is missing.

    Raises: UserError when there is no data set, it is damaged, or has no test images.
    """
    with accel.main_process_first():
        build_missing_digits(cfg.data.path, Console(cfg.steps, quiet=cfg.quiet == "on").say)
    info = read_info(cfg.data.path, cfg.data.build)
    if not info.num_test:
        raise UserError(f"{cfg.data.path} has no test images, which every evaluation needs. Build it with some.")
    return info


def heed_split(cfg: Settings) -> Settings:
    """The settings; where the data's split is not the protocol's, that is named with the protocol."""
    if cfg.data.disjoint is None:
        return cfg
    if read_facts(cfg.data.path).split.get("disjoint") in (None, cfg.data.disjoint):
        return cfg
    return cfg.model_copy(update={"protocol": with_change(cfg.protocol, "data.disjoint")})


def heed_weights(cfg: Settings) -> Settings:
    """The settings with the SHA-256 of the file of weights, by which a resumed run knows it.

    Raises: UserError where there is no such file, or it is not the one whose SHA-256 the settings have.
    """
    if cfg.net.weights in (None, PRETRAINED):
        return cfg
    path = Path(str(cfg.net.weights))
    checksum = check_file(path)
    if cfg.net.sha256 not in (None, checksum):
        raise UserError(
            f"net.weights={path} has the SHA-256 {checksum}, and net.sha256 is {cfg.net.sha256}. Name the file that is "
            "meant, or leave net.sha256 out."
        )
    return cfg.model_copy(update={"net": cfg.net.model_copy(update={"sha256": checksum})})


def make_method(cfg: Settings, info: Info, say: Callable[[str], None] | None = None) -> Method:
    """The method around its network, as every run of these settings begins with it: a function of the seed.

    Args:
        say: where it is given, weights are those of `start_from` or `net.weights`, and it takes a line about them.

    Raises: UserError for a network that does not exist, and for weights that cannot be had or do not fit.
    """
    set_seed(cfg.seed)
    net = build_net(**cfg.net.structure(), info=info)
    method = build_method(cfg.method.name, net, info, **cfg.method.options)
    method.net_groups = depth_groups(net, cfg.net.freeze, cfg.optim.layer_decay)
    if cfg.net.weights and say is not None:
        say(load_weights(net, cfg.net.name, cfg.net.weights, info.resolution))
    if cfg.start_from and say is not None:
        say(fit_start(method, load_start(Path(cfg.start_from), cfg.start_weights)) or f"starts from {cfg.start_from}")
    return method


def make_trainer(cfg: Settings, accel: Accelerator, method: Method, stopwatch: Stopwatch) -> Trainer:
    """The method with optimizer, averages and guard, for `train_step`."""
    stages = Stages(method.starts(), cfg.steps)
    optim = build_optimizer(method, cfg.optim, method.all_groups(0))
    guard = Guard(cfg.on_nonfinite, method, optim, scaled=accel.scaler is not None)
    trainer = Trainer(method, cfg.optim, stages, optim, Ema(method, cfg.ema), guard, cfg.seed)
    trainer.phase = stopwatch.phase
    return trainer


def cli(argv: Sequence[str]) -> int:
    """The command; returns its exit code: 0, 2 with one line for a user's mistake, 128 + n when signal n stopped it."""
    if argv and argv[0] in ("-h", "--help"):
        print(help_text(__doc__ or ""))
        return 0
    try:
        main(argv)
    except UserError as error:
        if speaks_for(error):
            print(f"error{process_name()}: {error}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        if rank() == 0:
            print(stop, file=sys.stderr)
        return 128 + stop.signum
    except (RuntimeError, OSError) as error:
        if not is_loss_of_a_process(error):
            raise
        print(
            f"error{process_name()}: the connection to another process is gone: it has ended, or its machine has. "
            "The same command goes on from the newest checkpoint.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    code = cli(sys.argv[1:])
    gc.freeze()  # nor among what ends with the process
    sys.exit(code)
