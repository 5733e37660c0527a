"""Back end `dali`: DALI reads the shards and makes the views with its own operators, on the CPU or the GPU.

Its views are distributed as the fused kernel's (`dali_ops` says what is equal to the bit); its order is
that of DALI's reader, in which every row of a rank's part comes once an epoch and the parts move from rank to rank from
epoch to epoch. Where a folder has no shards, its arrays are read, in the order of the other back ends.

DALI's operators cost about as much for a few images as for many, so one run of a pipeline makes the batches of several
steps. What comes at a step depends on all steps before it: `state` says where the pipelines stand, and `train` with a
state goes on from there at once; without one it runs through the steps before, which takes as long as they did.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from pipelines.arrays import Arrays
from pipelines.augment.views import View
from pipelines.backends.dali_shards import check_shards
from pipelines.batch import Batch, Part
from pipelines.loaders import Loaders, Reader
from pipelines.order import indices_at, plan_seed

PIXELS_A_RUN, STEPS_A_RUN = 1 << 20, 16  # at most, in one run of a pipeline
STATES = 8  # of the newest steps, kept for checkpoints: loops read ahead
_SOURCES = ("dali_graph.py", "dali_ops.py")  # what the graph is made of


class DaliLoaders(Loaders):
    """Loaders whose training batches come from DALI. Test images, which need no augmentation, come from the reader.

    Raises: UserError when DALI is missing, or the shards are damaged or belong to other rows.
    """

    def __init__(
        self, arrays: Arrays, reader: Reader, views: Sequence[View], labeled_view: View, **options: Any
    ) -> None:
        require_dali()
        super().__init__(arrays, reader, views, labeled_view, **options)
        self.backend = "dali"
        self._shards = {
            part: check_shards(arrays, part.name.lower(), rows)
            for part, rows in ((Part.LABELED, arrays.labeled_rows), (Part.UNLABELED, arrays.unlabeled_rows))
            if "train-dali/order.npy" in arrays.manifest.files
        }
        self._places: dict[int, dict[str, bytes]] = {}

    def train(self, start_step: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Endless batches from `start_step` on; `state` is what `state(start_step)` gave, and saves the way there.

        Raises: UserError when the state is of other settings, or DALI fails.
        """
        if start_step < 0:
            raise ValueError(f"start_step must be 0 or more, got {start_step}")
        if state is not None:
            self._check(state, start_step)
        return self._follow(start_step, state)

    def state(self, step: int) -> dict[str, Any] | None:
        """Where the pipelines stand before `step`, as plain values; None for a step that is not among the newest."""
        if step not in self._places:
            return None
        places = {part: base64.b64encode(place).decode() for part, place in self._places[step].items()}
        return {"step": step, "facts": self._facts(), "places": places}

    def _follow(self, start: int, state: dict[str, Any] | None) -> Iterator[Batch]:
        self._places.clear()
        streams = {part: self._open(part, start, state) for part, size in self._sizes.items() if size}
        nothing = torch.empty(0, dtype=torch.int64)
        for step in count(start):
            self._places[step] = {part.name.lower(): stream.place for part, stream in streams.items()}
            self._places.pop(step - STATES, None)
            labeled_ids, (x,) = streams[Part.LABELED].next()
            unlabeled_ids, u = streams[Part.UNLABELED].next() if self._views else (nothing.reshape(0, 2), ())
            y, rows = labeled_ids[:, 1].contiguous(), unlabeled_ids[:, 0].contiguous()
            yield Batch(x, self._to_device(y), tuple(u), self._to_device(rows))

    def _open(self, part: Part, start: int, state: dict[str, Any] | None) -> Stream:
        from pipelines.backends.dali_graph import Rows, Tars, build_pipeline

        size, side = self._sizes[part], self.info.resolution
        steps = max(1, min(STEPS_A_RUN, PIXELS_A_RUN // (size * side * side)))
        source: Any
        if part in self._shards:
            source = Tars(*self._shards[part], self._rank, self._world)
        else:
            source = Rows(lambda run: self._gather(part, range(run * steps, (run + 1) * steps)))

        def build(checkpoint: bytes | None) -> Any:
            return _one_line(
                build_pipeline,
                source,
                (self._labeled_view,) if part == Part.LABELED else self._views,
                side=side,
                mean=self.info.mean,
                std=self.info.std,
                batch=size * steps,
                seed=plan_seed(self._seed, int(part), self._rank) % 2**31,
                threads=self._threads,
                device_id=self._device.index if self._device.type == "cuda" else None,
                checkpoint=checkpoint,
            )

        place = None if state is None else base64.b64decode(state["places"][part.name.lower()])
        return Stream(build, steps, start, place, self._dtype, self._arrays.train_labels)

    def _gather(self, part: Part, steps: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images and ids of several steps, read from the arrays."""
        all_rows = self._arrays.labeled_rows if part == Part.LABELED else self._arrays.unlabeled_rows
        where = {"seed": self._seed, "part": int(part), "rank": self._rank, "world": self._world}
        chosen = [indices_at(len(all_rows), step, self._sizes[part], **where) for step in steps]
        rows = all_rows[np.concatenate(chosen)]
        return self._arrays.train[rows], np.stack([rows, self._arrays.train_labels[rows]], 1)

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a state to mean the same."""
        here = Path(__file__).parent
        return {
            "batch": {part.name.lower(): size for part, size in self._sizes.items()},
            "graph": hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()[:16],
            "views": [repr(view) for view in (self._labeled_view, *self._views)],
            "data": self.info.fingerprint,
            "shards": bool(self._shards),
            "seed": self._seed,
            "rank": self._rank,
            "world": self._world,
            "device": self._device.type,
            "dali": dali_version(),
        }

    def _check(self, state: dict[str, Any], step: int) -> None:
        now, then = {"step": step, **self._facts()}, {"step": state["step"], **state["facts"]}
        differ = [f"{key}: now {now[key]}, saved {then.get(key)}" for key in now if now[key] != then.get(key)]
        if differ:
            raise UserError(
                f"The saved state of DALI's pipelines is of other settings ({'; '.join(differ)}). "
                "Set them back, or start a new run."
            )


class Stream:
    """The batches of one part, cut from the runs of its pipeline.

    Args:
        build: makes the pipeline, from a checkpoint or None.
        steps: steps in a run.
        start: the first step wanted.
        place: what attribute `place` was before that step; None to run through all steps before it.
        labels: (N,) int64, class of every row.

    Attributes:
        place: checkpoint of the pipeline from before the run that holds the next step.
    """

    def __init__(
        self,
        build: Callable[[bytes | None], Any],
        steps: int,
        start: int,
        place: bytes | None,
        dtype: torch.dtype,
        labels: NDArray[np.int64],
    ) -> None:
        run, self._at = divmod(start, steps)
        self._steps, self._dtype, self._labels = steps, dtype, labels
        self._pipeline = build(place)
        if place is None:
            for _ in range(run):
                self._run()
        self.place: bytes = self._pipeline.checkpoint()
        self._held: tuple[Any, Any, torch.cuda.Event | None] = (None, None, None)
        self._ids, self._views = self._take() if self._at else (torch.empty(0), [])

    def next(self) -> tuple[Tensor, list[Tensor]]:
        """Ids (batch, 2) int64 of row and label on the CPU, and each view (batch, 3, H, W) channels_last."""
        if self._at == 0:
            self._ids, self._views = self._take()
        size = len(self._ids) // self._steps
        part = slice(self._at * size, (self._at + 1) * size)
        self._at = (self._at + 1) % self._steps
        if self._at == 0:
            self.place = self._pipeline.checkpoint()
        return self._ids[part], [view[part] for view in self._views]

    def _take(self) -> tuple[Tensor, list[Tensor]]:
        ids, *views = (torch.from_dlpack(output.as_tensor()) for output in self._run())
        rows, labels = ids.numpy().T
        if rows.min() < 0 or rows.max() >= len(self._labels) or (self._labels[rows] != labels).any():
            raise UserError("DALI read rows or labels that are not the data folder's. Build the data set again.")
        finished = [view.permute(0, 3, 1, 2).to(self._dtype) for view in views]
        self._hold(views)
        return ids, finished

    def _hold(self, views: list[Tensor]) -> None:
        """Keep a run's memory from DALI, which does not know of torch's streams, until kernels are done with it."""
        if not views[0].is_cuda:
            return
        _, newest, done = self._held
        if done is not None:
            done.synchronize()  # the kernels on the run before the newest; recorded a run ago, so this never waits long
        self._held = (newest, views, torch.cuda.current_stream(views[0].device).record_event())

    def _run(self) -> Any:
        return _one_line(self._pipeline.run)


def _one_line(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The call's result; an error of DALI as one line. Raises: UserError."""
    try:
        return call(*arguments, **options)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"DALI failed ({reason}). Build the data set again, or use the back end resident") from error


def require_dali() -> None:
    """Raises: UserError when DALI is not installed or cannot be loaded."""
    dali_version()
    try:
        import nvidia.dali.auto_aug  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"DALI is installed and does not load ({reason}). Use the back end resident") from None


def dali_version() -> str:
    """The version of DALI, whichever CUDA it is for. Raises: UserError when it is not installed."""
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    problem = "The back end dali needs DALI, which is not installed"
    raise UserError(f"{problem}. Install it (pip install 'semi-fast[dali]'), or use the back end resident")
