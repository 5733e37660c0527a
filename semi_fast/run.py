"""A run's folder, its log, evaluations, checkpoints and closing summary."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from data_prep.errors import UserError
from data_prep.manifest import replacing
from pipelines import Info, Loaders
from semi_fast.checkpoint import is_full, newest_checkpoint, save_checkpoint
from semi_fast.config import Settings
from semi_fast.curves import draw_curves
from semi_fast.ema import Ema
from semi_fast.evaluate import Metrics, evaluate
from semi_fast.meter import Meter
from semi_fast.methods import Method
from semi_fast.optim import momentum_by_name, restore_momentum
from semi_fast.run_folder import check_same, choose_folder
from semi_fast.saved_run import facts_from, write_facts
from semi_fast.stopping import StoppedError, StopRequest
from semi_fast.tracking import NoTracker, Tracker, console_line, duration, open_tracker

LAST = 20  # evaluations in the mean that is reported beside best and last


class Run:
    """Everything about a run that is not the training step itself. Silent in every process but the main one.

    Args:
        settings: the run's settings.
        accel: the Accelerator; decides which process writes.
        info: the data set.
    """

    def __init__(self, settings: Settings, accel: Accelerator, info: Info) -> None:
        self.settings, self.accel, self.info = settings, accel, info
        self.main = accel.is_main_process
        # Chosen once: another process would see the folder that the main one has just made.
        chosen = [choose_folder(settings) if self.main else None]
        self.folder: Path = broadcast_object_list(chosen)[0]
        self.history: list[dict[str, Any]] = []  # one entry an evaluation: step, and every scalar
        self.last: dict[str, Metrics] = {}
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0  # of the sessions before a resumption
        self.meter = Meter(0)
        self.tracker: Tracker = NoTracker()
        self.timed: list[float] = [0, 0.0]  # steps and seconds of the sessions before a resumption
        self.stop = StopRequest()

    def start(self, method: Method, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
        """Take over the newest checkpoint, open log and tracker; returns the step to go on from (0: a new run)."""
        step = self._resume(method, ema, optimizer)
        views = len(method.views) * self.settings.mu + 1
        self.meter = Meter(self.settings.batch * views * self.accel.num_processes, step)
        self.meter.training_steps, self.meter.training_seconds = int(self.timed[0]), self.timed[1]
        if self.main:
            resolved = self.settings.model_dump()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
                write_facts(self.folder, facts_from(self.settings.data.path))
                self._cut_log(step)
            except OSError as error:
                raise UserError(
                    f"Cannot write to the run's folder {self.folder}: {error}. Name another run_dir."
                ) from None
            self.tracker = open_tracker(
                self.settings.wandb,
                project=self.settings.wandb_project,
                name=self.folder.name,
                folder=self.folder,
                config={**resolved, "data_fingerprint": self.info.fingerprint},
                say=self.say,
            )
            self.say(f"run: {self.folder}" + (f", resumed at step {step:,}" if step else ""))
        return step

    def tick(self, step: int, method: Method, ema: Ema, optimizer: torch.optim.Optimizer, data: Loaders) -> None:
        """Log, evaluate and save when due after `step` steps: the only places that wait for the device.

        Raises: StoppedError, once the run is saved, when a signal asked for it.
        """
        s = self.settings
        last = step == s.steps
        log, test, save = (last or step % every == 0 for every in (s.log_every, s.eval_every, s.save_every))
        signum = None if last else self._asked_to_stop(log)
        if not (log or test or save or signum):
            return
        window = self.meter.read()  # before anything is kept: a diverged model is neither evaluated nor saved
        with self.meter.paused():
            if test:
                self._evaluate(step, method, ema, data)
            self._log(step, window)
            saved = (save or signum is not None) and self.main and self._save(step, method, ema, optimizer)
        if signum is not None:
            self.tracker.finish()
            raise StoppedError(signum, step, saved)

    def finish(self, method: Method, ema: Ema, data: Loaders) -> dict[str, Any]:
        """Write summary.json and curves.png, print the closing figures and return the summary."""
        if not self.last:  # resumed after its last step: killed between the last checkpoint and here
            self._evaluate(self.settings.steps, method, ema, data, record=False)
        summary = self._summary()
        if self.main:
            write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
            draw_curves(self.folder, self.info.class_names, self.info.labeled_counts)
            self.say(closing_lines(summary, self.folder))
        self.tracker.finish()
        return summary

    def say(self, line: str) -> None:
        """Print one line, in the main process alone."""
        if self.main:
            print(line, flush=True)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, from data to now, over all its sessions."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def _asked_to_stop(self, log: bool) -> int | None:
        # Processes must agree on the step, and asking the others waits for the device: only where that happens anyway.
        if self.accel.num_processes == 1:
            return self.stop.signum
        if not log:
            return None
        asked = torch.tensor(self.stop.signum or 0, device=self.accel.device)
        return int(self.accel.gather(asked).max()) or None

    def _evaluate(self, step: int, method: Method, ema: Ema, data: Loaders, *, record: bool = True) -> None:
        autocast, counts = self.accel.autocast, self.info.labeled_counts
        # A compiled network would be compiled once more for evaluation, and again for its short last batch.
        with torch.compiler.set_stance("force_eager"):
            with ema.swapped_in(method):
                averaged = evaluate(method, data.test(), counts, autocast)
            raw = evaluate(method, data.test(), counts, autocast)
        self.last = {
            **{f"ema/{head}": m for head, m in averaged.items()},
            **{f"raw/{head}": m for head, m in raw.items()},
        }
        reported = next(iter(self.last.values()))
        entry: dict[str, Any] = {"step": step, "eval/accuracy": reported.accuracy}
        for name, figures in self.last.items():
            entry.update(figures.scalars(f"eval/{name}"))
        entry["per_class"] = reported.per_class
        if not record:
            return
        self.history = [*(old for old in self.history if old["step"] < step), entry]
        if self.main:
            self._write({"kind": "eval", **entry})
            self.tracker.log({k: v for k, v in entry.items() if k.startswith("eval/")}, step)

    def _log(self, step: int, window: Any) -> None:
        if not window.logs or not self.main:
            return
        figures = {
            **window.logs,
            "throughput/images_per_s": window.images_per_s,
            "time/data_wait_share": window.data_wait,
        }
        self._write({"kind": "train", "step": step, "time": time.time(), **figures})
        self.tracker.log(figures, step)
        rate = self.meter.training_seconds / max(1, self.meter.training_steps)
        accuracy = self.history[-1]["eval/accuracy"] if self.history else None
        self.say(console_line(step, self.settings.steps, window, accuracy, rate * (self.settings.steps - step)))

    def _save(self, step: int, method: Method, ema: Ema, optimizer: torch.optim.Optimizer) -> bool:
        """Write a checkpoint; a full disk is said and survived, since the checkpoints before it are still there."""
        tensors = {
            "model": dict(method.state_dict()),
            "ema": ema.state_dict(),
            "optimizer": momentum_by_name(method, optimizer),
        }
        scaler = self.accel.scaler
        values = {
            "settings": self.settings.model_dump(),
            "data_fingerprint": self.info.fingerprint,
            "class_names": self.info.class_names,
            "history": self.history,
            "seconds": self.seconds,
            "timed": [self.meter.training_steps, self.meter.training_seconds],
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        try:
            save_checkpoint(self.folder / "checkpoints", step, tensors, values)
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            self.say(f"warning: no checkpoint of step {step:,}: the disk is full. Make room; training goes on.")
            return False
        return True

    def _resume(self, method: Method, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
        if self.settings.resume == "never":
            return 0
        found = newest_checkpoint(self.folder / "checkpoints", self.accel.device, self.say)
        if found is None:
            return 0
        check_same(self.settings, found.values, self.info, self.folder)
        method.load_state_dict(found.tensors["model"])
        ema.load_state_dict(found.tensors["ema"])
        restore_momentum(method, optimizer, found.tensors["optimizer"])
        if self.accel.scaler is not None and found.values["scaler"]:
            self.accel.scaler.load_state_dict(found.values["scaler"])
        self.history, self.earlier_seconds = found.values["history"], found.values["seconds"]
        self.timed = found.values["timed"]
        return found.step

    def _cut_log(self, step: int) -> None:
        # Lines written after the checkpoint that the run goes on from will be written again.
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept) if step else "")

    def _write(self, entry: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _summary(self) -> dict[str, Any]:
        accuracies = [entry["eval/accuracy"] for entry in self.history]
        recent = accuracies[-LAST:]
        reported = next(iter(self.last.values()))
        return {
            "data": self.info.name,
            "method": self.settings.method.name,
            "seed": self.settings.seed,
            "accuracy_best": max(accuracies),
            "accuracy_last": accuracies[-1],
            "accuracy_mean20": sum(recent) / len(recent),
            "evaluations_in_mean": len(recent),
            "heads": {name: figures.accuracy for name, figures in self.last.items()},
            "balanced": reported.balanced,
            "groups": reported.groups,
            "per_class": dict(zip(self.info.class_names, reported.per_class, strict=True)),
            "confusion": reported.confusion.tolist(),
            "steps": self.settings.steps,
            "seconds": self.seconds,
            "images_per_s": self.meter.images_per_s,
            "data_fingerprint": self.info.fingerprint,
            "torch": torch.__version__,
        }


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the half line of a process that was killed while writing it
        return 2**62


def closing_lines(summary: dict[str, Any], folder: Path) -> str:
    """The figures that matter, each named for what it is."""
    groups = ", ".join(f"{name} {value:.1f}" for name, value in summary["groups"].items())
    heads = ", ".join(f"{name} {value:.1f}" for name, value in summary["heads"].items())
    lines = [
        f"accuracy: best {summary['accuracy_best']:.2f}, last {summary['accuracy_last']:.2f}, "
        f"mean of the last {summary['evaluations_in_mean']} evaluations {summary['accuracy_mean20']:.2f}",
        f"by class size: {groups}",
        f"by head: {heads}",
        f"{summary['steps']:,} steps in {duration(summary['seconds'])}, {summary['images_per_s']:,.0f} images/s",
        f"written: {folder}{os.sep}summary.json, curves.png, log.jsonl, checkpoints{os.sep}",
    ]
    return "\n".join(lines)
