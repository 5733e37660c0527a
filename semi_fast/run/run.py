"""A run's folder, its log, evaluations, checkpoints and closing summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from data_prep.errors import UserError
from pipelines import Batch, Info, Loaders
from pipelines.reading import read_facts
from semi_fast.config import Settings
from semi_fast.methods import Method
from semi_fast.observe.console import Console, console_line, live_parts
from semi_fast.observe.meter import Meter, Window
from semi_fast.observe.monitor import watch
from semi_fast.observe.tracking import NoTracker, Tracker, track_run
from semi_fast.observe.usage import Usage
from semi_fast.processes.launch import check_alike
from semi_fast.run.folder import choose_folder
from semi_fast.run.log import LogWriter, write_text
from semi_fast.run.resume import Saver
from semi_fast.run.saved import write_facts
from semi_fast.run.summary import Summary, closing_rows, evaluation_entry, logged_name, summarize, write_summary
from semi_fast.training.ema import Ema
from semi_fast.training.evaluate import Metrics, evaluate
from semi_fast.training.guard import DivergedError, Guard
from semi_fast.training.stopping import StoppedError, StopRequest


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
        self.console = Console(settings.steps, quiet=settings.quiet == "on")
        # Chosen once: another process would see the folder that the main one has just made.
        chosen = [choose_folder(settings) if self.main else None]
        self.folder: Path = broadcast_object_list(chosen)[0]
        self.history: list[dict[str, Any]] = []  # one entry an evaluation: step, and every scalar
        self.last: dict[str, Metrics] = {}
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0  # of the sessions before a resumption
        self.log = LogWriter(self.folder / "log.jsonl", self.say)
        self.tracker: Tracker = NoTracker()
        self.saver = Saver(self.folder / "checkpoints", settings, accel, info, self.say)
        self.stop = StopRequest(self.console.warn)
        self.loader_state: dict[str, Any] | None = None  # where this process's loaders go on
        self.usage = Usage(accel.device, self.say)
        self.spent: dict[str, float] = {}  # seconds beside training, since the line of the log before

    def start(self, method: Method, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
        """Take over the newest checkpoint, open log and tracker; returns the step to go on from (0: a new run)."""
        step, values = self.saver.resume(method, ema, optimizer) or (0, {})
        check_alike(self.settings.model_dump(), self.info.fingerprint, step)
        self.history, self.earlier_seconds = values.get("history", []), values.get("seconds", 0.0)
        scaled, skipped = self.accel.scaler is not None, values.get("skipped", 0)
        self.guard = Guard(self.settings.on_nonfinite, method, optimizer, scaled=scaled, skipped=skipped)
        states = values.get("loaders")  # one for each process
        self.loader_state = states[min(self.accel.process_index, len(states) - 1)] if states else None
        views = len(method.views) * self.settings.mu + 1
        images = self.settings.batch * views * self.accel.num_processes
        self.meter = Meter(images, step, self.guard.accept, self.accel.device)
        self.meter.training_steps, self.meter.training_seconds = values.get("timed", (0, 0.0))
        if self.main:
            resolved = self.settings.model_dump()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
                write_facts(self.folder, read_facts(self.settings.data.path))
                self.log.cut(step)
            except OSError as error:
                raise UserError(
                    f"Cannot write to the run's folder {self.folder}: {error}. Name another run_dir."
                ) from None
            self.tracker = track_run(self.settings, self.info, self.folder, resumed=step > 0, say=self.say)
            self.say(f"run: {self.folder}" + (f", resumed at step {step:,}" if step else ""))
        return step

    def watch(self, method: Method, data: Loaders, batch: Batch, compiled: bool) -> None:
        """Measure from here on; `batch` is the first one."""
        watch(self.meter, self.settings, self.accel, method, data, batch, compiled)
        if self.meter.ceiling:
            self.say(f"ceiling: {self.meter.ceiling:,.0f} images/s through the network alone")
        if self.main:
            self.console.begin(self.meter.step)

    def tick(self, step: int, method: Method, ema: Ema, optimizer: torch.optim.Optimizer, data: Loaders) -> None:
        """Log, evaluate and save when due after `step` steps: the only places that wait for the device.

        Raises: StoppedError, once the run is saved, when a signal asked for it; DivergedError when loss, gradients or
            weights are not finite.
        """
        s = self.settings
        last = step == s.steps
        log, test, save = (last or step % every == 0 for every in (s.log_every, s.eval_every, s.save_every))
        signum = None if last else self.stop.agreed(self.accel, log)
        if self.main:
            self.console.step(step)
        if not (log or test or save or signum):
            return
        window = self._read(step, ema, keeps=test or save or signum is not None)
        with self.meter.paused():
            with self._spending("time/evaluation_s", test):
                best = test and self._evaluate(step, method, ema, data)
            self._log(step, window, optimizer.param_groups[0]["lr"])
            saves = save or best or signum is not None
            states = self._loader_states(data, step) if saves else None
            with self._spending("time/checkpoint_s", saves):
                saved = (
                    saves
                    and self.main
                    and self.saver.save(step, method, ema, optimizer, {**self._progress(), "loaders": states})
                )
        if signum is not None:
            self.tracker.finish()
            # The others wait for the one that saves: a launcher ends all processes once one has ended.
            saved = broadcast_object_list([saved])[0]
            self.accel.end_training()
            raise StoppedError(signum, step, saved)

    def finish(self, method: Method, ema: Ema, data: Loaders) -> Summary:
        """Write summary.json and return the summary."""
        if not self.last:  # resumed after its last step: killed between the last checkpoint and here
            self._evaluate(self.settings.steps, method, ema, data, record=False)
        summary = summarize(
            self.settings,
            self.info,
            self.history,
            self.last,
            head=method.reported,
            weights=method.weights,
            seconds=self.seconds,
            images_per_s=self.meter.images_per_s,
            skipped=self.guard.skipped,
            ceiling=self.meter.ceiling,
        )
        if self.main:
            try:
                write_summary(self.folder, summary)
            except UserError:  # the figures are not lost with the file
                self.console.box(f"{self.folder.name} is done", closing_rows(summary, self.folder))
                raise
        return summary

    def close(self, summary: Summary) -> None:
        """Publish what came out, report included, and print the closing figures."""
        if self.main:
            self.tracker.publish(summary.to_json(), self.info, self.folder)
            self.console.box(f"{self.folder.name} is done", closing_rows(summary, self.folder))
        self.tracker.finish()
        self.accel.end_training()

    def say(self, line: str) -> None:
        """Print one line, in the main process alone."""
        if self.main:
            self.console.say(line)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, from data to now, over all its sessions."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def _read(self, step: int, ema: Ema, keeps: bool) -> Window:
        # Before anything is kept: a diverged model is neither evaluated nor saved.
        try:
            window = self.meter.read()
            if keeps:
                self.guard.check_weights(step, ema)
        except DivergedError as error:
            raise DivergedError(f"{error} {self.saver.way_on()}") from None
        return window

    def _evaluate(self, step: int, method: Method, ema: Ema, data: Loaders, *, record: bool = True) -> bool:
        """Evaluate and record it; returns whether the reported accuracy is the best so far."""
        autocast, counts = self.accel.autocast, self.info.labeled_counts
        # A compiled network would be compiled once more for evaluation, and again for its short last batch.
        with torch.compiler.set_stance("force_eager"):
            with ema.swapped_in(method):
                averaged = evaluate(method, data.test(), counts, autocast)
            raw = evaluate(method, data.test(), counts, autocast)
        self.last = {
            **{logged_name(head, "averaged"): m for head, m in averaged.items()},
            **{logged_name(head, "raw"): m for head, m in raw.items()},
        }
        entry = evaluation_entry(step, self.last, logged_name(method.reported, method.weights))
        if not record:
            return False
        best = all(entry["eval/accuracy"] > old["eval/accuracy"] for old in self.history if old["step"] < step)
        self.history = [*(old for old in self.history if old["step"] < step), entry]
        if self.main:
            self.log.write({"kind": "eval", **entry})
            self.tracker.log({k: v for k, v in entry.items() if k.startswith("eval/")}, step)
        return best

    @contextmanager
    def _spending(self, name: str, due: bool) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if due:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

    def _log(self, step: int, window: Window, lr: float) -> None:
        if not window.steps or not self.main:
            return
        figures = {
            **window.logs,
            "throughput/images_per_s": window.images_per_s,
            "time/data_wait_share": window.data_wait,
            **window.more,
            **self.spent,
            **self.usage.read(),
            "optim/lr": lr,
            **({"guard/skipped": float(self.guard.skipped)} if self.guard.counts else {}),
        }
        self.spent = {}
        self.log.write({"kind": "train", "step": step, "time": time.time(), **figures})
        self.tracker.log(figures, step)
        rate = self.meter.training_seconds / max(1, self.meter.training_steps)
        accuracy = self.history[-1]["eval/accuracy"] if self.history else None
        line = console_line(step, self.settings.steps, window, accuracy, rate * (self.settings.steps - step))
        self.console.window(step, line, live_parts(window, accuracy), keep="time/evaluation_s" in figures)

    def _loader_states(self, data: Loaders, step: int) -> list[Any] | None:
        state = data.state(step)
        return None if state is None else gather_object([state])

    def _progress(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "seconds": self.seconds,
            "timed": [self.meter.training_steps, self.meter.training_seconds],
            "skipped": self.guard.skipped,
        }
