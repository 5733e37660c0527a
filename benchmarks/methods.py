"""What methods cost beside the network: `python -m benchmarks.methods`. Two JSON lines:

`refresh`: a refinement of DARP's table from a cold start (`semi_fast.parts.darp_solver`), of 100,000 x 10 and of
50,000 x 127 made-up predictions, against a plain host loop in NumPy and SciPy: a stable sort a class, then coordinate
ascent with a secant search a class, until no column is off by more than COLUMNS of its count. The answers are compared
before anything is timed: rows sum to 1, columns to the counts; `difference` is the largest between both solutions.

`methods`: a step of every method, with its options as they are by default, nine tenths through a run, on a small
network that yet takes most of the time. The ratios are its time over that of FixMatch's step; `most over passes` is the
largest of these over the images through the network in proportion, in which an image without backward, such as the
averaged network's, counts a third. What a method does now and then only (a refinement, an evaluation, a new stage) is
not in them.

On a GPU seconds pass on the wall, on a CPU they are those that one thread computed.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.optimize import newton
from torch import Tensor, nn

from benchmarks.common import ONE_THREAD, Turn, fastest, in_turns, options, report, timed
from benchmarks.random_data import random_folder
from pipelines import open_loaders, read_info
from semi_fast.config import load_settings
from semi_fast.methods import method_names
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.parts import darp_solver
from semi_fast.train import make_method, make_trainer
from semi_fast.training.device import image_dtype, make_accelerator
from semi_fast.training.look import RunLook
from semi_fast.training.step import train_step

TABLES = ((100_000, 10, 100.0), (50_000, 127, 286.0))  # images, classes, imbalance
ALPHA, SWEEPS, COLUMNS = 2.0, 5, 2e-6
STEPS, REFERENCE = 1_000, "fixmatch"
WITHOUT_BACKWARD = 1 / 3  # a backward pass is two forward passes' work

Array = NDArray[np.float64]


def main() -> None:
    """Measure and print the JSON lines."""
    parser = options(__doc__, rounds=15, seconds=60)
    parser.add_argument("--net", default="wrn10_1")
    parser.add_argument("--batch", type=int, default=64, help="labeled images a step")
    parser.add_argument("--table", action="store_true", help="print the methods' rows for docs/methods.md, too")
    arguments = parser.parse_args()
    accel, precision = make_accelerator("auto", None if torch.cuda.is_available() else 1)
    tables = {f"{images} x {classes}": refresh(images, classes, gamma) for images, classes, gamma in TABLES}
    refreshes = {f"{who} {name}": turn for name, (turns, _) in tables.items() for who, turn in turns.items()}
    times = in_turns(refreshes, 3, warmup=0)  # the answers have been compared, which warmed them
    ratios = {name: fastest(times[f"host {name}"]) / fastest(times[f"ours {name}"]) for name in tables}
    found = {name: figures for name, (_, figures) in tables.items()}
    report("refresh", ratios, times, "refinement", columns=COLUMNS, tables=found)
    with tempfile.TemporaryDirectory() as name:
        random_folder(Path(name), rows=4_000)
        methods(Path(name), arguments, accel, precision.value)


def refresh(images: int, classes: int, gamma: float) -> tuple[dict[str, Turn], dict[str, float]]:
    """A refinement of such a table, checked: both as cases, and how far apart they are."""
    table, counts = predictions(images, classes, gamma)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_device, c = torch.from_numpy(table).to(device), torch.from_numpy(counts).float().to(device)
    zero, whole = torch.zeros(classes, device=device), torch.ones((), device=device)

    def ours() -> tuple[Tensor, Tensor]:
        cleaned = darp_solver.clean(on_device, c, ALPHA)
        return cleaned, darp_solver.solve(cleaned, c, zero, whole, SWEEPS)[0]

    def host() -> tuple[Array, int]:
        return host_project(host_clean(table.astype(np.float64), counts), counts)

    (expected, rounds), solution = host(), darp_solver.refined(*ours()).double().cpu().numpy()
    rows, columns = np.abs(solution.sum(1) - 1).max(), (np.abs(solution.sum(0) - counts) / counts).max()
    difference = np.abs(solution - expected).max()
    if rows > 1e-5 or columns > COLUMNS or difference > 1e-3:
        raise RuntimeError(f"not the same answer: rows {rows}, columns {columns}, difference {difference}")
    figures = {"host_rounds": rounds, "rows_off": rows, "columns_off": columns, "difference": difference}
    return {"host": timed(host, clock=ONE_THREAD), "ours": timed(ours, clock=ONE_THREAD)}, {
        name: float(value) for name, value in figures.items()
    }


def predictions(images: int, classes: int, gamma: float) -> tuple[NDArray[np.float32], Array]:
    """Predictions that lean to the head, (m, K), and the class counts to be reached, (K,)."""
    generator = np.random.default_rng(0)
    prior = gamma ** (-np.arange(classes) / (classes - 1))
    prior /= prior.sum()
    logits = generator.normal(1.3 * np.log(prior), 1.5, (images, classes))
    logits[np.arange(images), generator.choice(classes, images, p=prior)] += 3
    table = np.exp(logits - logits.max(1, keepdims=True))
    return (table / table.sum(1, keepdims=True)).astype(np.float32), images * prior


def host_clean(table: Array, counts: Array) -> Array:
    """A of `darp_solver.clean`, a class at a time."""
    kept = np.zeros_like(table)
    for k in range(table.shape[1]):
        best = np.argsort(-table[:, k], kind="stable")[: int(ALPHA * counts[k])]
        kept[best, k] = table[best, k]
    scaled = kept * (counts + 1e-6) / (kept.sum(0) + 1e-6) + 1e-6
    return scaled / scaled.sum(1, keepdims=True)


def host_project(cleaned: Array, counts: Array) -> tuple[Array, int]:
    """X by coordinate ascent: rescale the rows, then find the multiplier of each class in turn; and the rounds."""
    uncertainty = -(cleaned * np.log(cleaned + 1e-6)).sum(1)
    nu, factors = np.zeros(len(counts)), np.ones_like(cleaned)
    solution, rounds = cleaned, 0
    while (np.abs(solution.sum(0) - counts) / counts).max() > COLUMNS:
        rows, rounds = 1 / (cleaned * factors).sum(1), rounds + 1
        for k in range(len(counts)):

            def surplus(x: float, k: int = k, rows: Array = rows) -> float:
                return (rows * cleaned[:, k] * np.exp(-x * uncertainty)).sum() - counts[k]

            nu[k] = newton(surplus, nu[k], tol=0.1, maxiter=30)  # without a derivative: the secant method
            factors[:, k] = np.exp(-nu[k] * uncertainty)
        solution = cleaned * factors
        solution /= solution.sum(1, keepdims=True)
    return solution, rounds


def methods(folder: Path, arguments: argparse.Namespace, accel: Accelerator, precision: str) -> None:
    """Time a step of every method, and print the JSON line."""
    made = {name: Step(name, folder, arguments, accel, precision) for name in method_names()}
    times = in_turns({name: step.seconds for name, step in made.items()}, arguments.rounds, arguments.seconds, warmup=0)
    for step in made.values():
        step.close()
    least = {name: fastest(values) for name, values in times.items()}
    reference = made[REFERENCE].images
    over = {name: seconds / least[REFERENCE] for name, seconds in least.items()}
    passes = {name: round(over[name] * reference / step.images, 3) for name, step in made.items()}
    images = {name: step.images for name, step in made.items()}
    facts = {"net": arguments.net, "batch": arguments.batch, "precision": precision}
    report("methods", {**over, "most over passes": max(passes.values())}, times, "step", **facts, images=images)
    if arguments.table:
        for name in made:
            print(f"| `{name}` | {over[name]:.2f} ({passes[name]:.2f}) |")


class Step:
    """A method in training, nine tenths through its run.

    Attributes:
        images: through the network in a step.
    """

    def __init__(
        self, name: str, folder: Path, arguments: argparse.Namespace, accel: Accelerator, precision: str
    ) -> None:
        words = [f"data={folder}", f"method={name}", f"net={arguments.net}", f"batch={arguments.batch}"]
        cfg = load_settings(["cifar10_lt", *words, f"steps={STEPS}", "compile=off"])
        info = read_info(folder)
        self._method = make_method(cfg, info).to(accel.device).to(memory_format=torch.channels_last)
        data = open_loaders(
            folder,
            self._method.streams,
            batch=cfg.batch,
            mu=cfg.mu,
            seed=cfg.seed,
            device=accel.device,
            dtype=image_dtype(precision),
            policies=cfg.views.policies(),
        )
        self._trainer = make_trainer(cfg, accel, self._method, Stopwatch(accel.device))
        look = RunLook(self._trainer, data, 0, lambda: make_method(cfg, info), accel.autocast)
        self._trainer.prepare(accel)
        with torch.no_grad():  # a stage that trains a head alone asks for a network that has seen images
            self._method.net(torch.randn(2, 3, info.resolution, info.resolution, device=accel.device))
        now = STEPS * 9 // 10
        for step in range(now + 1):
            stage = self._trainer.stages.at(step)
            if stage.first == step:
                look.step = step
                self._method.begin(stage.number, look)
                self._trainer.regroup(stage.number)
        self._batches, self._steps, self.close = data.train(now), itertools.count(now), data.close
        self.images = 0.0
        nets = (self._method.net, self._trainer.ema.method.net)
        hooks = [net.register_forward_hook(self._count) for net in nets]
        self.seconds()
        for hook in hooks:
            hook.remove()

    def _count(self, net: nn.Module, images: tuple[Tensor], features: Tensor) -> None:
        self.images += len(images[0]) * (1.0 if features.requires_grad else WITHOUT_BACKWARD)

    def seconds(self) -> float:
        """Seconds of a step on a batch that is ready."""
        batch = next(self._batches)
        return timed(lambda: train_step(self._trainer, batch, next(self._steps)), clock=ONE_THREAD)()


if __name__ == "__main__":
    main()
