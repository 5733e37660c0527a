"""Train a classifier: `accelerate launch semi_fast/train.py [CONFIG] [key=value ...]`.

CONFIG is a file of configs/, by name or path; without it, `digits_lt`, whose data set is built where it is missing.
`accelerate launch semi_fast/train.py --help` lists every setting.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from accelerate.utils import set_seed

from data_prep.errors import UserError
from pipelines import open_loaders, read_info
from semi_fast.config import load_settings
from semi_fast.digits import build_missing_digits
from semi_fast.methods import Context, build_method
from semi_fast.nets import build_net
from semi_fast.observe.banner import describe, help_text
from semi_fast.observe.console import Console
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.processes.launch import is_loss_of_a_process, keep_buffers, process_name, rank, speaks_for
from semi_fast.processes.sync_norm import synchronize_batchnorm
from semi_fast.run.run import Run
from semi_fast.training.device import choose_compile, image_dtype, make_accelerator
from semi_fast.training.ema import Ema
from semi_fast.training.optim import build_optimizer, set_lr
from semi_fast.training.schedules import cosine_7_16
from semi_fast.training.stopping import StoppedError


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Train as the command line says and return the run's summary.

    Raises: UserError for what the user can put right; StoppedError when SIGTERM or Ctrl-C ended the run early.
    """
    cfg = load_settings(argv)
    accel, precision = make_accelerator(cfg.precision, cfg.threads)
    with accel.main_process_first():
        build_missing_digits(cfg.data.path, Console(cfg.steps, quiet=cfg.quiet == "on").say)
    info = read_info(cfg.data.path)  # classes, counts, mean, std: all from the manifest
    if not info.num_test:
        raise UserError(f"{cfg.data.path} has no test images, which every evaluation needs. Build it with some.")
    set_seed(cfg.seed)
    net = build_net(cfg.net.name, bn_momentum=cfg.net.bn_momentum)
    if accel.num_processes > 1:
        synchronize_batchnorm(net, accel.device)
    method = build_method(cfg.method.name, net, info, **cfg.method.options).to(accel.device)
    compiled = choose_compile(cfg.compile.use, accel.device, precision.value, cfg.steps)

    stopwatch = Stopwatch(accel.device)
    # The loaders are not prepared by Accelerate: they shard by rank themselves.
    data = open_loaders(
        cfg.data.path,
        method.views,
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
    run = Run(cfg, accel, info, stopwatch)
    run.say(describe(cfg, info, f"{data.backend} ({data.reason})", method, accel, precision, compiled))
    optim, ema = build_optimizer(method, cfg.optim), Ema(method, cfg.ema_decay)
    start = run.start(method, ema, optim)
    if compiled.value == "on":
        method.compile_parts(cfg.compile.mode)
    wrapped, prepared = accel.prepare(method, optim)
    keep_buffers(wrapped)

    try:
        batches = data.train(start_step=start, state=run.loader_state)
        batch = next(batches)
        method.train()
        run.watch(method, data, batch, compiled.value == "on")
        with run.stop.listening():
            for step in range(start, cfg.steps):
                ctx = Context.at(step, cfg.steps)
                set_lr(optim, cfg.optim.lr * cosine_7_16(ctx.progress))
                run.guard.begin_step()
                with stopwatch.phase("forward_backward"):
                    out = wrapped(batch, ctx)
                    accel.backward(out.loss)
                run.meter.count(out.pseudo, batch.u_rows)
                with stopwatch.phase("data_wait"):  # here, because a GPU still has work
                    batch = next(batches)
                logs = run.guard.judge(out.loss, out.logs)
                with stopwatch.phase("optimizer"):
                    prepared.step()
                    prepared.zero_grad(set_to_none=True)
                    ema.update(method)
                run.meter.add(out.loss, logs)
                run.tick(step + 1, method, ema, optim, data)  # log, evaluate, save when due: the only host syncs
        return run.finish(method, ema, data)
    finally:
        run.console.close()
        data.close()


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
    sys.exit(cli(sys.argv[1:]))
