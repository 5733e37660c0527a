"""A whole SeMi step against the bare model, and against eager float32: `python -m benchmarks.step`.

Three loops take turns on the same network (WRN-28-2 on 32 px, 64 labeled images and 64 x (1 weak + 2 strong) views):
  step        the trainer's: pipeline, mixed precision, loss, bank, backward, optimizer, EMA
  model_only  forward, cross-entropy, backward and optimizer on ready tensors of the same size and precision
  eager_fp32  the trainer's step in float32, contiguous memory format, not compiled
`efficiency` = model_only / step; `speedup` = eager_fp32 / step.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import interleave, report
from data_prep.manifest import Manifest, file_entry, write_manifest
from data_prep.writers import write_array
from pipelines import open_loaders, read_info
from semi_fast.config import OptimSettings
from semi_fast.device import choose_compile, image_dtype, make_accelerator
from semi_fast.ema import Ema
from semi_fast.methods import Context, build_method
from semi_fast.nets import build_net
from semi_fast.optim import build_optimizer

LABELED, CLASSES, SIDE, VIEWS = 64, 10, 32, 3
OPTIM = OptimSettings()


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each loop")
    parser.add_argument("--net", default="wrn28_2")
    arguments = parser.parse_args()
    accel, precision = make_accelerator("auto", None)
    compiled = choose_compile("auto", accel.device, precision.value, 250_000).value
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_folder(folder)
        full, close = trainer_step(folder, arguments.net, accel.device, precision.value, compiled == "on")
        plain, close_plain = trainer_step(folder, arguments.net, accel.device, "fp32", False, torch.contiguous_format)
        bare = model_step(arguments.net, accel.device, precision.value, compiled == "on")
        seconds = interleave({"step": full, "model_only": bare, "eager_fp32": plain}, rounds=arguments.rounds, warmup=2)
        close()
        close_plain()
    report(
        "step",
        {
            "step_ms": 1e3 * seconds["step"],
            "model_only_ms": 1e3 * seconds["model_only"],
            "efficiency": seconds["model_only"] / seconds["step"],
            "eager_fp32_ms": 1e3 * seconds["eager_fp32"],
            "speedup": seconds["eager_fp32"] / seconds["step"],
            "images_per_s": LABELED * (1 + VIEWS) / seconds["step"],
            "net": arguments.net,
            "precision": precision.value,
            "compile": compiled,
        },
    )


def trainer_step(
    folder: Path,
    net: str,
    device: torch.device,
    precision: str,
    compiled: bool,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step as train.py makes it, past the warm-up so that every part of the loss is on; and its loaders' close."""
    torch.manual_seed(0)
    method = build_method("semi", build_net(net, bn_momentum=0.001), read_info(folder), warmup_epochs=0)
    method = method.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    data = open_loaders(folder, method.views, batch=LABELED, seed=0, device=device, dtype=image_dtype(precision))
    optim, ema = build_optimizer(method, OPTIM), Ema(method, 0.999)
    if compiled:
        method.net.compile()
    batches, steps = data.train(), itertools.count()

    def step() -> None:
        batch = next(batches)
        if layout != torch.channels_last:
            batch = batch._replace(x=batch.x.contiguous(), u=tuple(view.contiguous() for view in batch.u))
        with autocast(device, precision):
            out = method(batch, Context.at(next(steps), 250_000))
        out.loss.backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
        ema.update(method)

    return step, data.close


def model_step(net: str, device: torch.device, precision: str, compiled: bool) -> Callable[[], None]:
    """Forward, cross-entropy, backward and optimizer on ready tensors: what no pipeline or method can go below."""
    torch.manual_seed(0)
    backbone = build_net(net, bn_momentum=0.001)
    model = nn.Sequential(backbone, nn.Linear(backbone.num_features, CLASSES)).to(device)
    x = torch.randn(LABELED * (1 + VIEWS), 3, SIDE, SIDE, device=device, dtype=image_dtype(precision))
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (len(x),), device=device)
    optim = build_optimizer(model, OPTIM)
    if compiled:
        backbone.compile()

    def step() -> None:
        with autocast(device, precision):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optim.step()
        optim.zero_grad(set_to_none=True)

    return step


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context Accelerate puts around the forward."""
    return torch.autocast(
        device.type, torch.bfloat16 if precision == "bf16" else torch.float16, enabled=precision != "fp32"
    )


def random_folder(folder: Path) -> None:
    """A data folder of the size of CIFAR-10-LT (N1=500, M1=4000), with random pixels: speed does not see them."""
    rng = np.random.default_rng(0)
    arrays = {
        "train": rng.integers(0, 256, (11_158, SIDE, SIDE, 3), dtype=np.uint8),
        "test": rng.integers(0, 256, (CLASSES, SIDE, SIDE, 3), dtype=np.uint8),
        "train_labels": rng.integers(0, CLASSES, 11_158),
        "test_labels": np.arange(CLASSES),
        "labeled_rows": np.arange(1_236),
        "unlabeled_rows": np.arange(11_158),
    }
    for name, array in arrays.items():
        write_array(folder / f"{name}.npy", array)
    write_manifest(
        folder,
        Manifest(
            name="random",
            resolution=SIDE,
            class_names=[f"class {k}" for k in range(CLASSES)],
            labeled_counts=np.bincount(arrays["train_labels"][:1_236], minlength=CLASSES).tolist(),
            unlabeled_counts=np.bincount(arrays["train_labels"], minlength=CLASSES).tolist(),
            test_counts=[1] * CLASSES,
            mean=[0.5] * 3,
            std=[0.29] * 3,
            split={},
            source="random pixels",
            command="python -m benchmarks.step",
            files={f"{name}.npy": file_entry(folder / f"{name}.npy") for name in arrays},
        ),
    )


if __name__ == "__main__":
    main()
