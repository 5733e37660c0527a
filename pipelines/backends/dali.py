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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pipelines.batch import Batch, Sizes
from pipelines.loaders import Loaders, Reader, Source
from pipelines.order import part_number, plan_seed

PIXELS_A_RUN, STEPS_A_RUN = 1 << 20, 16  # at most, in one run of a pipeline
STATES = 8  # of the newest steps, kept for checkpoints: loops read ahead
_SOURCES = ("dali_graph.py", "dali_ops.py")  # what the graph is made of


class DaliLoaders(Loaders):
    """Loaders whose training batches come from DALI. Test images, which need no augmentation, come from the reader.

    Raises: UserError when DALI is missing, the shards are damaged or belong to other rows, or streams or views are
        asked for that it does not serve: it has "labeled" and "unlabeled" with the run's batch, or "labeled" alone, and
        no view that resizes its crop or jitters.
    """

    def __init__(
        self, arrays: Arrays, reader: Reader, sizes: Sizes, policies: Mapping[str, View], **options: Any
    ) -> None:
        require_dali()
        for name, stream in sizes.streams.items():
            if name not in ("labeled", "unlabeled") or stream != (name, stream.views, False, None):
                raise _unserved(f"the stream '{name}' ({stream})")
        if "labeled" not in sizes.streams:
            raise _unserved("none named 'labeled'")
        super().__init__(arrays, reader, sizes, policies, **options)
        for name in sum((stream.views for stream in sizes.streams.values()), ()):
            if policies[name].area or any(policies[name].jitter):
                problem = f"The back end dali has no resized crop and no color jitter, got the view '{name}'"
                raise UserError(f"{problem}. Use the back end resident or ffcv")
        self.backend = "dali"
        self._shards = {
            name: check_shards(arrays, name, rows)
            for name, rows in (("labeled", arrays.labeled_rows), ("unlabeled", arrays.unlabeled_rows))
            if "train-dali/order.npy" in arrays.manifest.files
        }
        self._checkpoints: dict[int, dict[str, bytes]] = {}

    def train(self, start_step: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Endless batches from `start_step` on; `state` is what `state(start_step)` gave, and saves the way there.

        Raises: UserError when the state is of other settings, or DALI fails.
        """
        if start_step < 0:
            raise ValueError(f"start_step must be 0 or more, got {start_step}")
        if state is not None:
            self._check(state, start_step)
        return self._follow(start_step, state)

    def relabel(self, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Raises: UserError: the labeled images of the shards are what they are."""
        raise _unserved("other labeled rows than the data set's")

    def state(self, step: int) -> dict[str, Any] | None:
        """Where the pipelines stand before `step`, as plain values; None for a step that is not among the newest."""
        if step not in self._checkpoints:
            return None
        checkpoints = {name: base64.b64encode(data).decode() for name, data in self._checkpoints[step].items()}
        return {"step": step, "facts": self._facts(), "checkpoints": checkpoints}

    def _follow(self, start: int, state: dict[str, Any] | None) -> Iterator[Batch]:
        self._checkpoints.clear()
        parts, groups = {s.name: self._open(s, start, state) for s in self._sources()}, self.sizes.groups
        for step in count(start):
            self._checkpoints[step] = {name: part.checkpoint for name, part in parts.items()}
            self._checkpoints.pop(step - STATES, None)
            ids, views = {}, []
            for name, part in parts.items():
                ids[name], finished = part.next()
                views += finished
            rows = {name: self._to_device(pairs[:, 0].contiguous()) for name, pairs in ids.items()}
            labels = {"labeled": self._to_device(ids["labeled"][:, 1].contiguous())}
            yield Batch(torch.cat(views), groups, labels, rows)

    def _open(self, source: Source, start: int, state: dict[str, Any] | None) -> PartBatches:
        from pipelines.backends.dali_graph import Rows, Tars, build_pipeline

        side = self.info.resolution
        steps = max(1, min(STEPS_A_RUN, PIXELS_A_RUN // (source.size * side * side)))
        images: Any
        if source.name in self._shards:
            images = Tars(*self._shards[source.name], self._shard["rank"], self.sizes.world)
        else:
            images = Rows(lambda run: self._gather(source, range(run * steps, (run + 1) * steps)))

        def build(checkpoint: bytes | None) -> Any:
            return _one_line(
                build_pipeline,
                images,
                source.views,
                side=side,
                mean=self.info.mean,
                std=self.info.std,
                batch=source.size * steps,
                seed=plan_seed(self._seed, part_number(source.name), self._shard["rank"]) % 2**31,
                threads=self._threads,
                device_id=self._device.index if self._device.type == "cuda" else None,
                checkpoint=checkpoint,
            )

        checkpoint = None if state is None else base64.b64decode(state["checkpoints"][source.name])
        return PartBatches(build, steps, start, checkpoint, self._dtype, self._arrays.train_labels)

    def _gather(self, source: Source, steps: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images and ids of several steps, read from the arrays."""
        rows = np.concatenate([self._rows([source], step) for step in steps])
        return self._arrays.train[rows], np.stack([rows, self._arrays.train_labels[rows]], 1)

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a state to mean the same."""
        here = Path(__file__).parent
        return {
            "batch": {name: self.sizes.of(name) for name in self.sizes.streams},
            "graph": hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()[:16],
            "views": {name: [repr(view) for view in views] for name, views in self._views.items()},
            "data": self.info.fingerprint,
            "shards": bool(self._shards),
            "seed": self._seed,
            **self._shard,
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


class PartBatches:
    """The batches of one part, cut from the runs of its pipeline.

    Args:
        build: makes the pipeline, from a checkpoint or None.
        steps: steps in a run.
        start: the first step wanted.
        checkpoint: what attribute `checkpoint` was before that step; None to run through all steps before it.
        labels: (N,) int64, class of every row.

    Attributes:
        checkpoint: of the pipeline, from before the run that holds the next step.
    """

    def __init__(
        self,
        build: Callable[[bytes | None], Any],
        steps: int,
        start: int,
        checkpoint: bytes | None,
        dtype: torch.dtype,
        labels: NDArray[np.int64],
    ) -> None:
        run, self._at = divmod(start, steps)
        self._steps, self._dtype, self._labels = steps, dtype, labels
        self._pipeline = build(checkpoint)
        if checkpoint is None:
            for _ in range(run):
                self._run()
        self.checkpoint: bytes = self._pipeline.checkpoint()
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
            self.checkpoint = self._pipeline.checkpoint()
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


def _unserved(wanted: str) -> UserError:
    streams = "the streams 'labeled' and 'unlabeled' with the run's batch, or 'labeled' alone"
    return UserError(f"The back end dali serves {streams}, got {wanted}. Use the back end resident or ffcv")


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
    raise UserError(f"{problem}. Install it (pip install -e '.[dali]'), or use the back end resident")
