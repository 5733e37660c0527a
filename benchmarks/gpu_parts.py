"""The parts of benchmarks.gpu. Each says what it has found as soon as it has, for it may be stopped at any time."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import ROOT, hardware, installed
from benchmarks.random_data import random_folder
from pipelines import VIEWS, Stream, open_loaders
from pipelines.augment.op import augment
from pipelines.augment.plan import OPS, Planner
from pipelines.augment.randaugment import COLUMNS

# Memory bandwidth in bytes a second by what is in the name of a card, from the data sheets.
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.039e12}
VIEWS_OF_EACH = ("weak", "strong", "strong")
MEAN, STD = (torch.tensor(values, dtype=torch.float64) for values in ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
METHODS = ("semi", "fixmatch")
STILL = ("wandb=off", "report=off", "quiet=on", "resume=never")
LAUNCHED = "launched "  # begins the lines of a process that the sanitizer watches
GRAPHS = ("graph", "graph_alone")  # the ways to run a step that record it
# What is compared over the first steps: name, way to run a step, and the one it is measured against.
PAIRS = (
    ("eager against eager again", "eager", "eager"),
    ("graph against eager", "graph_alone", "eager"),
    ("compiled graph against compiled", "graph", "default"),
)


class Scale(NamedTuple):
    """How much is done."""

    net: str
    batch: int
    steps: int  # of a training
    rated: int  # of a run whose rate alone counts
    equal: int  # of runs that are compared
    sides: tuple[int, ...]  # of images
    bank: tuple[tuple[int, int, int], ...]  # K, n, d
    calls: int  # of what is timed
    large_net: str
    large: tuple[int, int, int, int]  # side in pixels, classes, images to evaluate, steps
    modes: tuple[str, ...]  # of compilation


REAL = Scale(
    net="wrn28_2", batch=64, steps=2_000, rated=300, equal=50, sides=(32, 64, 128),
    bank=((10, 128, 128), (127, 512, 2048)), calls=200, large_net="resnet50", large=(64, 127, 50_000, 50),
    modes=("eager", "default", "graph", "reduce-overhead"),
)  # fmt: skip
SMALL = Scale(
    net="wrn10_1", batch=4, steps=5, rated=5, equal=5, sides=(16,), bank=((3, 8, 16),), calls=3,
    large_net="wrn10_1", large=(16, 5, 20, 5), modes=("eager", "graph"),
)  # fmt: skip


class Lab(NamedTuple):
    """Where a part works, how much it does, and who hears of it.

    folder is temporary; data is a data folder to train on, None for random pixels; say takes a name and its figures.
    """

    device: torch.device
    scale: Scale
    folder: Path
    data: Path | None
    say: Callable[[str, Any], None]


def kernels(lab: Lab) -> None:
    """Driver, card, versions; the first launch of every kernel, compilation included, and whether it is right."""
    lab.say("machine", machine(lab.device))
    found: dict[str, Any] = {}
    for name, first, expected in kernel_cases(lab):
        wanted = expected()
        synchronize(lab.device)
        start = time.perf_counter()
        got = first()
        synchronize(lab.device)
        seconds = time.perf_counter() - start
        equal = all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
        found[name] = {"first_ms": round(1e3 * seconds, 3), "equal_to_cpu": equal}
        lab.say("kernels", found)
    wrong = [name for name, case in found.items() if not case["equal_to_cpu"]]
    if wrong:
        raise SystemExit(f"not what the CPU makes of it: {', '.join(wrong)}")


def launches(lab: Lab) -> None:
    """Every kernel once, for whoever watches its memory: few blocks, of sizes that are compiled by then."""
    scale = lab.scale._replace(sides=lab.scale.sides[:1], bank=lab.scale.bank[:1], batch=SMALL.batch)
    for name, first, _ in kernel_cases(lab._replace(scale=scale)):
        first()
        synchronize(lab.device)
        print(f"{LAUNCHED}{name}", flush=True)


def marked_tests(lab: Lab) -> None:
    """The tests marked `gpu`, file by file of those that have some."""
    if find_spec("pytest") is None:
        lab.say("skipped", "pytest is not installed")
        return
    marked = re.compile(r"^ *(@|marks=\[)pytest\.mark\.gpu", re.MULTILINE)
    files = sorted(file for file in (ROOT / "tests").rglob("test_*.py") if marked.search(file.read_text()))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-ra"]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for file in files:
        done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
        lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()] or ["no word of it"]
        for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]):
            counts[word] += int(count)
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if done.returncode and not wrong:
            wrong = [f"{file.name}: exit code {done.returncode}: {lines[-1][-300:]}"]
        failed += wrong
        lab.say("marked", counts)
        lab.say("not_passed", failed)
    if failed:
        raise SystemExit(failed[0])


def sanitizer(lab: Lab) -> None:
    """Both tools on a process that launches each kernel."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], toolkit]))
    if program is None:
        lab.say("skipped", "compute-sanitizer is not there")
        return
    target = [sys.executable, "-m", "benchmarks.gpu", "--part", "launches", "--device", lab.device.type]
    target += ["--folder", str(lab.folder), *(["--small"] if lab.scale is SMALL else [])]
    found: dict[str, dict[str, Any]] = {}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", *target]
        # With torch's own cache of memory, what lies beyond a tensor would be another's and no error.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        case = found[tool] = {"launched": [], "exit_code": None, "summary": "no word of it"}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                if line.startswith(LAUNCHED):
                    case["launched"].append(line.removeprefix(LAUNCHED).strip())
                    lab.say("tools", found)
                elif line.strip():
                    case["summary"] = line.strip("= \n")[:300]  # which the tool prints last
        case["exit_code"] = process.returncode
        lab.say("tools", found)
    bad = [tool for tool, case in found.items() if case["exit_code"]]
    if bad:
        raise SystemExit(f"{bad[0]}: {found[bad[0]]['summary']}")


def speed(lab: Lab) -> None:
    """Kernels, in time and bytes; rates of the loaders; the step on paper; rates of steps by how they are compiled."""
    data, times, rates, paper, steps = train_folder(lab), {}, {}, {}, {}
    for name, measure in (("views", augment_times), ("bank", bank_times)):
        with surviving(times, name):
            times |= measure(lab)
        lab.say("kernels", times)
    for backend in ("resident", *(["ffcv"] if find_spec("ffcv") and (data / "train.beton").exists() else [])):
        with surviving(rates, backend):
            rates[backend] = loader_rate(lab, data, backend)
    lab.say("loaders", rates)
    with surviving(paper, "paper"):
        from benchmarks.roofline import CASES, weigh

        paper["paper"] = weigh(*(CASES[0] if lab.scale is REAL else (lab.scale.net, 32, 10)))
    lab.say("paper", paper["paper"])
    for mode in lab.scale.modes:
        with surviving(steps, mode):
            steps[mode] = rate(lab, mode, data, lab.scale.rated)
        lab.say("steps", steps)
    raise_failed(times, rates, paper, steps)


def training(lab: Lab) -> None:
    """Whole runs: their rate, their memory from the first windows to the last; how far apart graph and others end."""
    data, runs, equality = train_folder(lab), {}, {}
    for method in METHODS:
        with surviving(runs, method):
            runs[method] = rate(lab, "graph", data, lab.scale.steps, method=method)
        lab.say("runs", runs)
    ends: dict[str, tuple[float, Tensor]] = {}
    for name, mode, other in PAIRS:
        with surviving(equality, name):
            if other not in ends:
                ends[other] = end_of(lab, other, data)
            (loss, weights), (loss_there, there) = end_of(lab, mode, data), ends[other]
            apart = float(torch.linalg.vector_norm(weights - there) / torch.linalg.vector_norm(there))
            equality[name] = {"loss": abs(loss - loss_there) / abs(loss_there), "weights": apart}
        lab.say("equality", equality)
    raise_failed(runs, equality)


def end_of(lab: Lab, mode: str, data: Path) -> tuple[float, Tensor]:
    """Mean loss of a few steps, and the network's weights and statistics after them, in a row.

    The log is read once, at the end: a reading waits for the device, which might hide that something does not.
    """
    from semi_fast.run.saved import load_start

    steps = lab.scale.equal
    folder = trained(lab, mode, data, steps, f"log_every={steps}", "ceiling=off")
    tensors = load_start(folder, "raw")
    row = [value.flatten().double() for name, value in tensors.items() if name.startswith("net.")]
    return windows(folder)[-1]["loss/total"], torch.cat(row)


def large(lab: Lab) -> None:
    """An evaluation as long as ImageNet-127's, and steps of its network."""
    side, classes, images, steps = lab.scale.large
    folder = lab.folder / "large"
    random_folder(folder, side=side, classes=classes, rows=20 * classes, labeled=4 * classes, test=images)
    found: dict[str, Any] = {}
    with surviving(found, "evaluation"), opened(lab, folder, "resident") as loaders:
        found["evaluation"] = {"images": images, "seconds": evaluation_seconds(lab, loaders)}
    lab.say("evaluation", found["evaluation"])
    with surviving(found, "steps"):  # as a graph alone: to compile so large a network takes longer than the part has
        found["steps"] = rate(lab, "graph_alone", folder, steps, net=lab.scale.large_net)
    lab.say("training", found["steps"])
    raise_failed(found)


def dali(lab: Lab) -> None:
    """Batches of DALI on the device."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        lab.say("skipped", "DALI is not installed")
        return
    lab.say("loaders", {"dali": loader_rate(lab, train_folder(lab), "dali")})


def two(lab: Lab) -> None:
    """The step in two processes, a GPU each."""
    if lab.device.type == "cuda" and torch.cuda.device_count() < 2:
        lab.say("skipped", "there is one GPU")
        return
    command = [sys.executable, "-m", "benchmarks.step", "--processes", "2", "--net", lab.scale.net]
    done = subprocess.run([*command, "--rounds", "5"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no word of it"))
    lab.say("step", json.loads(done.stdout.splitlines()[-1]))


def machine(device: torch.device) -> dict[str, Any]:
    """Card, driver and versions."""
    found: dict[str, Any] = dict(hardware())
    found |= {name: installed(name) for name in ("numba-cuda", "accelerate")}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {"memory_gb": round(facts.total_memory / 1e9, 1), "multiprocessors": facts.multi_processor_count}
        found |= {"capability": f"{facts.major}.{facts.minor}", "cuda": torch.version.cuda}
        asked = (
            subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=False,
            )
            if shutil.which("nvidia-smi")
            else None
        )
        found["driver"] = asked.stdout.split("\n")[0] if asked else None
    return found


def kernel_cases(lab: Lab) -> Iterator[tuple[str, Callable[[], list[Tensor]], Callable[[], list[Tensor]]]]:
    """Name, the call on the device and the same on the CPU, of every kernel: views by size and dtype, and the bank.

    A call is to be made once, and finds its inputs where it needs them.
    """
    from benchmarks.memory_bank import confident, full_bank

    for side in lab.scale.sides:
        for dtype in (torch.bfloat16, torch.float32):
            images, others = view_inputs(side, 4 * lab.scale.batch, dtype)
            stored = images.to(lab.device)
            yield (
                f"views {side} px {str(dtype).removeprefix('torch.')}",
                lambda stored=stored, others=others: [augment(stored, *others)],
                lambda images=images, others=others: [augment(images, *others)],
            )
    for classes, rows, width in lab.scale.bank:
        bank, _ = full_bank(classes, 128, width)
        offered = confident(rows, classes, width)
        there = copy.deepcopy(bank).to(lab.device), [part.to(lab.device) for part in offered]
        yield f"bank K={classes} n={rows} d={width}", pushing(*there), pushing(bank, offered)


def pushing(bank: Any, offered: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A push into a bank, which returns what the bank then holds."""

    def push() -> list[Tensor]:
        bank.push(*offered)
        return list(bank.buffers())

    return push


def view_inputs(side: int, count: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Any, ...]]:
    """Random images, and what else `augment` takes to make weak and strong views of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    views = [VIEWS[name] for name in VIEWS_OF_EACH]
    planner = Planner(views, side, side)
    plan = torch.from_numpy(planner.sample_all(views, count // 4, generator))
    rows = torch.arange(count // 4).repeat(len(views))
    return images, (rows, plan, planner.table, MEAN, STD, dtype, 1)


def augment_times(lab: Lab) -> dict[str, Any]:
    """Host and device time of a launch that makes a step's views, and what it moves of the card's bandwidth."""
    found = {}
    for side in lab.scale.sides:
        images, others = view_inputs(side, 4 * lab.scale.batch, torch.bfloat16)
        stored, views, pixels = images.to(lab.device), len(others[0]), 3 * side * side
        times = call_times(lab, lambda stored=stored, others=others: augment(stored, *others))
        bytes_a_view = 3 * pixels + 4 * (OPS + 3) + 8 * COLUMNS * 2 + 24
        moved = views * bytes_a_view / (1e-6 * times["device_us"])
        found[f"{views} views of {side} px"] = {**times, **bandwidth(moved)}
    return found


def bank_times(lab: Lab) -> dict[str, Any]:
    """The same of a push, every candidate taken in: candidate and entry read, entry written, sums read and written."""
    from benchmarks.memory_bank import confident, full_bank

    found = {}
    for classes, rows, width in lab.scale.bank:
        bank, low = full_bank(classes, 128, width, lab.device.type)
        step = [part.to(lab.device) for part in confident(rows, classes, width)]

        def push(bank: Any = bank, low: Tensor = low, step: list[Tensor] = step) -> None:
            bank.confidences.copy_(low)
            bank.push(*step)

        times = call_times(lab, push)
        moved = 4 * width * (3 * rows + 2 * classes) / (1e-6 * times["device_us"])
        found[f"push K={classes} n={rows} d={width}"] = {**times, **bandwidth(moved)}
    return found


def call_times(lab: Lab, call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of the host for a call, and of the device where many are queued one behind the other."""
    for _ in range(3):
        call()
    synchronize(lab.device)
    start = time.perf_counter()
    for _ in range(lab.scale.calls):
        call()
    queued = time.perf_counter() - start
    synchronize(lab.device)
    done = time.perf_counter() - start
    return {name: round(1e6 * t / lab.scale.calls, 2) for name, t in (("host_us", queued), ("device_us", done))}


def bandwidth(rate: float) -> dict[str, Any]:
    """Bytes a second, and their share of the card's, where its data sheet is known."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    most = next((value for name, value in BANDWIDTH.items() if name in card), None)
    return {"bytes_per_s": round(rate), "bandwidth_share": round(rate / most, 4) if most else None}


def train_folder(lab: Lab) -> Path:
    """What to train on: the folder given, or random pixels."""
    if lab.data is not None:
        return lab.data
    folder = lab.folder / "data"
    if not folder.exists():
        if lab.scale is REAL:
            random_folder(folder)
        else:
            random_folder(folder, side=lab.scale.sides[0], rows=60, labeled=30)
    return folder


def mode_settings(lab: Lab, mode: str) -> list[str]:
    """The settings of a way to run a step.

    eager; default and reduce-overhead: compiled in that mode of torch.compile; graph_alone: eager kernels as one graph;
    graph: compiled ones as one graph (on a CPU, where compiling takes longer than the part has, eager ones).
    """
    graph = f"compile.graph={'step' if mode in GRAPHS else 'off'}"
    if mode in ("eager", "graph_alone") or lab.scale is SMALL:
        return ["compile=off", graph]
    return ["compile=on", graph, *([] if mode == "graph" else [f"compile.mode={mode}"])]


def trained(lab: Lab, mode: str, data: Path, steps: int, *more: str, method: str = "semi") -> Path:
    """Train in this process; the folder of the run.

    Raises: RuntimeError where steps were to be replayed, and were not.
    """
    from accelerate.state import AcceleratorState

    from semi_fast.train import main
    from semi_fast.training.graph import WARM_UP

    AcceleratorState._reset_state(True)
    torch._dynamo.reset()
    gc.collect()
    if lab.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    folder = lab.folder / f"run{time.monotonic_ns()}"
    settings = [f"data={data}", f"run_dir={folder}", f"method={method}", f"net={lab.scale.net}", f"steps={steps}"]
    settings += [f"batch={lab.scale.batch}", f"eval_every={steps}", f"save_every={steps}", *STILL]
    warnings = io.StringIO()
    try:
        with redirect_stderr(warnings):
            main(["cifar10_lt", *settings, *mode_settings(lab, mode), *more])
    finally:
        print(warnings.getvalue(), file=sys.stderr, flush=True)
    if mode in GRAPHS:
        lines = windows(folder)
        first = [0, *(line["step"] for line in lines)]
        made = zip(lines, first, strict=False)
        replayed = sum(round(line.get("graph/replayed", 0) * (line["step"] - start)) for line, start in made)
        if replayed < steps - WARM_UP:
            said = " ".join(line for line in warnings.getvalue().splitlines() if line.startswith("warning: graph"))
            raise RuntimeError(f"{replayed} of {steps} steps were replayed as a graph. {said}")
    return folder


def windows(folder: Path) -> list[dict[str, Any]]:
    """The windows of a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def rate(
    lab: Lab, mode: str, data: Path, steps: int, *, method: str = "semi", net: str | None = None
) -> dict[str, Any]:
    """Rate of the last quarter of a run, its memory after the first quarter and at the end."""
    more = [f"log_every={-(-steps // 4)}", *([f"net={net}"] if net else [])]
    first, *_, last = windows(trained(lab, mode, data, steps, *more, method=method))
    return {
        "images_per_s": last["throughput/images_per_s"],
        "step_ms": last["time/step_ms"],
        "ceiling_share": last.get("throughput/ceiling_share"),
        "replayed": last.get("graph/replayed", 0.0),
        "settings": mode_settings(lab, mode),
        "device_mb": [window.get("memory/device_mb") for window in (first, last)],
        "host_mb": [window["memory/host_mb"] for window in (first, last)],
    }


@contextmanager
def opened(lab: Lab, folder: Path, backend: str) -> Iterator[Any]:
    """Loaders of a folder on the device."""
    streams = {"labeled": Stream("labeled", ("weak",)), "unlabeled": Stream("unlabeled", VIEWS_OF_EACH)}
    loaders = open_loaders(
        folder, streams, batch=lab.scale.batch, seed=0, device=lab.device, dtype=torch.bfloat16, backend=backend
    )
    try:
        yield loaders
    finally:
        loaders.close()


def loader_rate(lab: Lab, folder: Path, backend: str) -> dict[str, Any]:
    """Images a second of a back end, and why its views are made where they are."""
    with opened(lab, folder, backend) as loaders:
        batches = loaders.train()
        images = sum(len(batch.images) for batch in islice(batches, 3)) // 3
        synchronize(lab.device)
        start = time.perf_counter()
        for _ in islice(batches, lab.scale.calls):
            pass
        synchronize(lab.device)
        seconds = time.perf_counter() - start
        batches.close()
    return {"images_per_s": round(lab.scale.calls * images / seconds), "reason": loaders.reason}


def evaluation_seconds(lab: Lab, loaders: Any) -> float:
    """Seconds of an evaluation of a folder's test images, the second one, uncompiled as that of a short run."""
    from semi_fast.methods import build_method
    from semi_fast.nets import build_net
    from semi_fast.training.evaluate import batch_size, evaluate

    info = loaders.info
    method = build_method("fixmatch", build_net(lab.scale.large_net, bn_momentum=0.1), info).to(lab.device)
    seconds = 0.0
    for _ in range(2):
        synchronize(lab.device)
        start = time.perf_counter()
        test = loaders.test(batch_size(info.num_test, info.resolution, lab.device))
        evaluate(method, test, info.labeled_counts, lambda: torch.autocast(lab.device.type, torch.bfloat16))
        seconds = time.perf_counter() - start
    return seconds


@contextmanager
def surviving(found: dict[str, Any], name: str) -> Iterator[None]:
    """What fails within is recorded under its name, and the part goes on."""
    try:
        yield
    except Exception as error:  # whatever it is, the other figures are worth having
        found[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def raise_failed(*groups: dict[str, Any]) -> None:
    """Raises: SystemExit with all that `surviving` has recorded in them, in one line."""
    failed = [f"{name}: {case['failed']}" for group in groups for name, case in group.items() if "failed" in case]
    if failed:
        raise SystemExit("; ".join(failed))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
