"""A run's folder, its log, evaluations, checkpoints and closing summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from data_prep.errors import UserError
from pipelines import Batch, Info, Loaders
from pipelines.reading import read_facts
from semi_fast.config import Settings
from semi_fast.methods import Method
from semi_fast.observe.ceiling import measure_ceiling
from semi_fast.observe.console import Console
from semi_fast.observe.health import Health, Idleness, hidden_counts
from semi_fast.observe.meter import Eta, Figures, Meter, Usage
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.observe.tracking import Tracker, open_tracker
from semi_fast.processes.launch import check_alike
from semi_fast.run.checkpoint import clear_leftovers, keep_newest
from semi_fast.run.folder import choose_folder
from semi_fast.run.log import LogWriter, write_text
from semi_fast.run.resume import resume_run, save_run, way_on
from semi_fast.run.saved import write_facts
from semi_fast.run.summary import Summary, closing_rows, code_commit, logged_name, score, summarize, write_summary
from semi_fast.training.device import image_dtype
from semi_fast.training.evaluate import Metrics, batch_size, evaluate
from semi_fast.training.guard import DivergedError
from semi_fast.training.look import RunLook
from semi_fast.training.stages import images_left
from semi_fast.training.step import Done, Trainer
from semi_fast.training.stopping import StoppedError, StopRequest

COMPILE_PAYS_AFTER = 20  # evaluations: compiling takes as long as it saves in so many of a large network


class Run:
    """Everything about a run that is not the training step itself. Silent in every process but the main one.

    Args:
        settings: the run's settings.
        accel: the Accelerator; decides which process writes.
        info: the data set.
        stopwatch: measures the phases of the steps.
    """

    def __init__(self, settings: Settings, accel: Accelerator, info: Info, stopwatch: Stopwatch) -> None:
        self.settings, self.accel, self.info, self.stopwatch = settings, accel, info, stopwatch
        self.main = accel.is_main_process
        self.console = Console(settings.steps, quiet=settings.quiet == "on")
        # Chosen once: another process would see the folder that the main one has just made.
        chosen = [choose_folder(settings) if self.main else None]
        self.folder: Path = broadcast_object_list(chosen)[0]
        self.history: list[dict[str, Any]] = []  # one entry an evaluation: step, and every scalar
        self.last: dict[str, Metrics] = {}
        self.predict: Callable[[Tensor], dict[str, Tensor]] | None = None  # of the reported weights, where compiled
        self.compiled = False  # whether training is
        self.started = time.perf_counter()
        self.commit = code_commit() if self.main else ""
        self.evaluating = 0.0  # seconds since then
        self.earlier_seconds = 0.0  # of the sessions before a resumption
        self.log = LogWriter(self.folder / "log.jsonl", self.say)
        self.tracker = Tracker(None, self.say)
        self.checkpoints = self.folder / "checkpoints"
        self.stop = StopRequest(self.console.warn)
        self.loader_state: dict[str, Any] | None = None  # where this process's loaders go on
        self.usage = Usage(accel.device, self.say)
        self.eta = Eta(
            settings.steps, {"time/evaluation_s": settings.eval_every, "time/checkpoint_s": settings.save_every}
        )
        self.spent: dict[str, float] = {}  # seconds beside training, since the line of the log before

    def resume(self, trainer: Trainer, data: Loaders, look: RunLook) -> int:
        """Take over the newest checkpoint; returns the step to go on from (0: a new run). Writes nothing."""
        self.trainer, self.data, self.look = trainer, data, look
        step, values = resume_run(self.checkpoints, trainer, data, self.accel, self.settings, self.say)
        check_alike(self.settings.model_dump(), self.info.fingerprint, step)
        self.history, self.earlier_seconds = values.get("history", []), values.get("seconds", 0.0)
        trainer.guard.skipped = values.get("skipped", 0)
        states = values.get("loaders")  # one for each process
        self.loader_state = states[min(self.accel.process_index, len(states) - 1)] if states else None
        self.meter = Meter(self.stopwatch, self._images_of_stage(step), data.sizes.samples_per_step, step)
        self.meter.take_over(*values.get("timed", (0, 0.0, 0)))
        self.idleness = Idleness(self.settings.method.options.get("tau"), step, self.say)
        return step

    def open(self, step: int) -> None:
        """Open folder, log and tracker of a run that goes on from that step."""
        if self.main:
            resolved = self.settings.model_dump()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
                write_facts(self.folder, read_facts(self.settings.data.path))
                logged = self.log.cut(step)
                clear_leftovers(self.checkpoints)
            except OSError as error:
                raise UserError(
                    f"Cannot write to the run's folder {self.folder}: {error}. Name another run_dir."
                ) from None
            name, method = self.info.name, self.settings.method.name
            self.tracker = open_tracker(
                self.settings.wandb,
                project=self.settings.wandb_project,
                name=self.folder.name,
                folder=self.folder,
                config={**resolved, "data_name": name, "data_fingerprint": self.info.fingerprint},
                group=f"{name}-{method}",
                tags=[name, method, self.settings.net.name, *(["resumed"] if step else [])],
                logged=logged if step else None,
                say=self.say,
            )
            self.say(f"run: {self.folder}" + (f", resumed at step {step:,}" if step else ""))

    def watch(self, compiled: bool) -> None:
        """Measure from here on.

        Args:
            compiled: whether the network is compiled.
        """
        s, meter, data, method = self.settings, self.meter, self.data, self.trainer.method
        self.compiled = compiled
        # On a CPU that saves 4 % of an evaluation.
        if compiled and self.accel.device.type == "cuda" and s.steps >= COMPILE_PAYS_AFTER * s.eval_every:
            self.predict = torch.compile(self._weights()[method.weights].predict, dynamic=False)
        meter.statistics = partial(method.statistics, data.sizes.labeled_per_step)
        if "unlabeled" in data.sizes.streams:
            device = self.accel.device
            meter.health = Health(self.info.labeled_counts, data.hidden_labels(), data.unlabeled_rows, device)
        if s.ceiling == "on":
            meter.ceiling = measure_ceiling(
                method.net,
                self.info.num_classes,
                self._images(),
                s.optim,
                self.accel.autocast,
                compiled=s.compile.mode if compiled else None,
            )
            if self.accel.device.type == "cuda":  # the peak is that of training
                torch.cuda.reset_peak_memory_stats(self.accel.device)
            self.say(f"ceiling: {meter.ceiling:,.0f} images/s through the network alone")
        meter.restart()
        if self.main:
            self.console.step(meter.step)

    def _images(self) -> Tensor:
        """Noise of as many images, as large and of the dtype, as this process's network sees in a step."""
        count, side = sum(group.rows for group in self.data.sizes.groups), self.info.resolution
        generator = torch.Generator(self.accel.device).manual_seed(0)
        images = torch.randn(count, 3, side, side, generator=generator, device=self.accel.device)
        return images.to(image_dtype(self.accel.mixed_precision), memory_format=torch.channels_last)

    def take(self, done: Done) -> None:
        """Take in what a step logged; it stays on the device."""
        self.meter.count(done.pseudo)
        self.meter.add(done.names, done.figures)

    def _images_of_stage(self, step: int) -> int:
        """Images that pass through the network in each step of the stage that this one belongs to."""
        return self.data.sizes.images_without(self.trainer.method.idle(self.trainer.stages.at(step).number))

    def begin_stage(self, step: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Let the method begin a stage where one begins with this step; returns the batches from there on."""
        stage = self.trainer.stages.at(step)
        if stage.first != step:
            return batches
        self.meter.images_per_step = self._images_of_stage(step)
        with self.meter.paused():
            self.look.step = step
            self.trainer.method.begin(stage.number, self.look)
            self.look.step = None
            self.trainer.regroup(stage.number)
            if self.look.relabeled:
                self.look.relabeled = False
                batches.close()  # type: ignore[attr-defined]
                batches = self.data.train(step)
        return batches

    def tick(self, step: int) -> None:
        """Log, evaluate and save when due after `step` steps: the only places that wait for the device.

        Raises: StoppedError, once the run is saved, when a signal asked for it; DivergedError when loss, gradients or
            weights are not finite.
        """
        s = self.settings
        last = step == s.steps
        log, test, save = (last or step % every == 0 for every in (s.log_every, s.eval_every, s.save_every))
        signum = None if last else self.stop.agreed(self.accel, log)
        if self.main:
            self.console.step(step, partial(self._seconds_left, step))
        if not (log or test or save or signum):
            return
        window = self._read(step, keeps=test or save or signum is not None)
        with self.meter.paused():
            with self._spending("time/evaluation_s", test):
                best = test and self._evaluate(step)
            self._log(step, window, self.trainer.rate_in_use(step - 1))
            saves = save or best or signum is not None
            state = self.data.state(step) if saves else None
            states = None if state is None else gather_object([state])
            with self._spending("time/checkpoint_s", saves):
                saved = saves and self.main and self._save(step, states)
        if signum is not None:
            self.tracker.finish()
            # The others wait for the one that saves: a launcher ends all processes once one has ended.
            saved = broadcast_object_list([saved])[0]
            self.accel.end_training()
            raise StoppedError(signum, step, saved)

    def finish(self) -> Summary:
        """Write summary.json and return the summary."""
        method, meter = self.trainer.method, self.meter
        if not self.last:  # resumed after its last step: killed between the last checkpoint and here
            self._evaluate(self.settings.steps, record=False)
        summary = summarize(
            self.settings,
            self.info,
            self.history,
            self.last,
            method.reported,
            method.weights,
            seconds=self.seconds,
            images_per_s=meter.images_per_s,
            steps_skipped=self.trainer.guard.skipped,
            commit=self.commit,
            ceiling_share=meter.images_per_s / meter.ceiling if meter.ceiling else None,
        )
        if self.main:
            try:
                clear_leftovers(self.checkpoints)
                keep_newest(self.checkpoints, self.settings.steps, self.settings.keep)
                write_summary(self.folder, summary)
            except UserError:  # the figures are not lost with the file
                self.console.box(f"{self.folder.name} is done", closing_rows(summary, self.folder))
                raise
        return summary

    def close(self, summary: Summary) -> None:
        """Publish what came out, report included, and print the closing figures."""
        if self.main:
            data = self.data
            unlabeled = hidden_counts(data.hidden_labels(), data.unlabeled_rows, self.info.num_classes)
            self.tracker.publish(summary.to_json(), self.info, unlabeled, self.folder)
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

    def _seconds_left(self, step: int) -> float | None:
        per_image = self.meter.seconds_per_image
        images = images_left(self.trainer.method, self.data.sizes, self.trainer.stages, step)
        return self.eta.seconds_left(step, None if per_image is None else images * per_image)

    def _read(self, step: int, keeps: bool) -> Figures:
        # Before anything is kept: a diverged model is neither evaluated nor saved.
        try:
            window = self.meter.close(self.trainer.guard.accept(self.meter.step + 1, self.meter.fetch()))
            if keeps:
                self.trainer.guard.check_weights(step, self.trainer.ema)
        except DivergedError as error:
            raise DivergedError(f"{error} {way_on(self.checkpoints, self.settings.on_nonfinite)}") from None
        return window

    def _evaluate(self, step: int, *, record: bool = True) -> bool:
        """Evaluate and record it; returns whether it is the best so far, by validation images where there are some."""
        method, last = self.trainer.method, step == self.settings.steps
        # The other weights cost as much again; their figures are those of the last evaluation.
        self.last = {
            logged_name(head, weights): figures
            for weights, measured in self._weights().items()
            if last or weights == method.weights
            for head, figures in self._measure(measured, self.predict if weights == method.weights else None).items()
        }
        name = logged_name(method.reported, method.weights)
        reported = self.last[name]
        entry: dict[str, Any] = {"step": step, "reported": name, "eval/accuracy": reported.accuracy}
        for name, figures in self.last.items():
            entry |= figures.scalars(f"eval/{name}")
        if self.info.num_validation:
            measured = self._measure(self._weights()[method.weights], self.predict, validation=True)
            entry |= measured[method.reported].scalars("validation")
        entry["per_class"] = reported.per_class
        if not record:
            return False
        best = all(score(entry) > score(old) for old in self.history if old["step"] < step)
        self.history = [*(old for old in self.history if old["step"] < step), entry]
        if self.main:
            self.log.write({"kind": "eval", **entry})
        with self._eager():
            method.measured(self.trainer.context(step - 1), self.look)
        return best

    def _weights(self) -> dict[str, Method]:
        """The method by its weights."""
        return {"averaged": self.trainer.ema.method, "raw": self.trainer.method}

    def _measure(
        self, method: Method, predict: Callable[[Tensor], dict[str, Tensor]] | None, *, validation: bool = False
    ) -> dict[str, Metrics]:
        """Metrics of every head on test or validation images; with `predict`, where that is compiled for it.

        The latter come in batches of the size of the former, for which that is compiled.
        """
        info, share = self.info, -(-self.info.num_test // self.accel.num_processes)
        images = self.data.validation if validation else self.data.test
        test = images(batch_size(share, info.resolution, self.accel.device))
        with nullcontext() if predict else self._eager():
            return evaluate(method, test, info.labeled_counts, self.accel.autocast, predict)

    def _eager(self) -> AbstractContextManager[Any]:
        """Within, nothing is compiled: what training has compiled is for training alone."""
        # Asking torch imports its compiler, a second of a run that compiles nothing.
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    @contextmanager
    def _spending(self, name: str, due: bool) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if due:
            seconds = time.perf_counter() - start
            self.eta.took(name, seconds)
            self.spent[name] = self.spent.get(name, 0.0) + seconds
            if name == "time/evaluation_s":
                self.evaluating += seconds
                self.spent["time/evaluation_share"] = self.evaluating / (time.perf_counter() - self.started)

    def _log(self, step: int, window: Figures, lr: float) -> None:
        if not self.main:
            return
        figures = {
            **window,
            **self.spent,
            **self.usage.read(),
            "optim/lr": lr,
            **({"graph/replayed": self.trainer.graph.replayed_share()} if self.trainer.graph else {}),
            **({"guard/skipped": float(self.trainer.guard.skipped)} if self.trainer.guard.counts else {}),
        }
        self.spent = {}
        self.log.write({"kind": "train", "step": step, "time": time.time(), **figures})
        newest = self.history[-1] if self.history and self.history[-1]["step"] == step else {}
        self.tracker.log(
            {**figures, **{k: v for k, v in newest.items() if k.startswith(("eval/", "validation/"))}}, step
        )
        accuracy = self.history[-1]["eval/accuracy"] if self.history else None
        self.idleness.read(step, figures)
        self.console.window(step, figures, accuracy, self._seconds_left(step), keep="time/evaluation_s" in figures)

    def _save(self, step: int, loaders: list[Any] | None) -> bool:
        progress = {
            "history": self.history,
            "seconds": self.seconds,
            "timed": [self.meter.training_steps, self.meter.training_seconds, self.meter.training_images],
            "skipped": self.trainer.guard.skipped,
            "loaders": loaders,
        }
        saved = save_run(self.checkpoints, step, self.trainer, self.data, progress, self.accel, self.settings)
        if not saved:  # survived, since the checkpoints before it are still there
            self.say(f"warning: no checkpoint of step {step:,}: the disk is full. Make room; training goes on.")
        return saved
