"""The balanced confidence decay memory bank (sec. 3.3): the best embeddings of each class, and their mean."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pipelines.cuda import launch as cuda_launch
from semi_fast.memory_bank import scatter_cpu

Rule = Literal["confidence", "fifo"]
MUTATED = ("embeddings", "confidences", "rows", "sums", "pushed", "steps")


@torch.library.custom_op("semi_fast::bank_push", mutates_args=MUTATED, device_types="cpu")
def push(
    embeddings: Tensor,
    confidences: Tensor,
    rows: Tensor,
    sums: Tensor,
    pushed: Tensor,
    steps: Tensor,
    candidates: Tensor,
    classes: Tensor,
    scores: Tensor,
    mask: Tensor,
    sources: Tensor,
    beta: float,
    decay_every: int,
    fifo: bool,
    resum_every: int,
) -> None:
    """One step of the bank, in place, in one launch: push, prototype upkeep, and decay when it is due.

    All tensors are contiguous and on one device. Masked-out candidates are skipped inside: no shape depends on data.

    Args:
        embeddings: (K, S, d) float32. confidences: (K, S) float32. rows: (K, S) int64, which image each entry is of.
        sums: (K, d) float32, sum of the stored embeddings.
        pushed: (K,) int64, entries ever taken in; the class stores the smaller of this and S.
        steps: (K,) int64, calls so far. One number for all classes, held by each, so that classes need not wait.
        candidates: (n, d) float32. classes: (n,) int64 in [0, K) where the mask is on. scores: (n,) float32,
            confidences >= 0. mask: (n,) bool. sources: (n,) int64, what goes into ``rows``.
        beta, decay_every: every ``decay_every`` calls stored confidences are multiplied by ``beta``, after the push.
        fifo: replace the oldest entry of a full class instead of the least confident.
        resum_every: a class's sum is formed anew after so many entries.
    """
    scatter_cpu.push(
        embeddings,
        confidences,
        rows,
        sums,
        pushed,
        steps,
        candidates,
        classes,
        scores,
        mask,
        sources,
        beta,
        decay_every,
        fifo,
        resum_every,
    )


@push.register_kernel("cuda")
def _(*arguments: Any) -> None:
    cuda_launch.require(arguments[0].device)  # says what is wrong or missing
    from semi_fast.memory_bank import scatter_cuda

    scatter_cuda.push(*arguments)


@push.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned; the state keeps its shapes."""


class MemoryBank(nn.Module):
    """Embeddings of confident samples, at most S a class, and the mean of each class: its prototype.

    Push: candidates are taken in order. If their class has a free slot they take it; else, if more confident than the
    lowest stored confidence of the class, they replace exactly that entry (ties: the lowest slot index); else they are
    dropped. Every ``decay_every`` pushes all stored confidences are multiplied by ``beta``: old entries give way.
    *released*: entries pushed since the last decay are spared; the paper's sentence is "all". The released code also
    moves embeddings and confidences apart when it inserts, losing the best embedding.

    The prototype sum is kept by adding the new and subtracting the old embedding in float32. It is formed anew, in
    float64, once a class has taken in ``RESUM_EVERY`` entries since it was last: with E the largest absolute coordinate
    stored meanwhile and n candidates a push, no prototype is off by more than 2 (RESUM_EVERY + n) 2^-24 (S + 2) / S E,
    however long the run: 1.4e-4 E with n = 128.

    Under several processes every rank must push the same candidates (``processes.gather``); the banks then stay the
    same to the bit.

    Args:
        num_classes: K. num_features: d. size: S, slots of a class.
        beta: decay factor in (0, 1]. decay_every: pushes between decays.
        rule: "confidence", or "fifo", a plain class-balanced queue: the oldest goes (ablation of Table 5).
    """

    RESUM_EVERY = 1024

    embeddings: Tensor  # (K, S, d) float32; slots beyond counts hold zeros
    confidences: Tensor  # (K, S) float32
    rows: Tensor  # (K, S) int64, row of train.npy behind each entry; -1 where a slot is free
    sums: Tensor  # (K, d) float32
    pushed: Tensor  # (K,) int64
    steps: Tensor  # (K,) int64

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        size: int = 128,
        beta: float = 0.99,
        decay_every: int = 100,
        rule: Rule = "confidence",
    ) -> None:
        super().__init__()
        self.beta, self.decay_every, self.rule = beta, decay_every, rule
        self.register_buffer("embeddings", torch.zeros(num_classes, size, num_features))
        self.register_buffer("confidences", torch.zeros(num_classes, size))
        self.register_buffer("rows", torch.full((num_classes, size), -1))
        self.register_buffer("sums", torch.zeros(num_classes, num_features))
        self.register_buffer("pushed", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros(num_classes, dtype=torch.int64))

    def check_device(self) -> None:
        """To be called before a run writes anything, where the bank is on the device of the run.

        Raises: UserError where no kernel runs on the GPU.
        """
        if self.sums.is_cuda:
            cuda_launch.require(self.sums.device)

    @property
    def counts(self) -> Tensor:
        """Entries stored of each class, (K,) int64 in [0, S]."""
        return self.pushed.clamp_max(self.embeddings.shape[1])

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """The mean stored embedding of each class, (K, d) float32, and which classes have one, (K,) bool.

        Classes without entries have a row of zeros. Read it before the step's own push.
        """
        state: dict[str, Any] = self._buffers  # attribute access on a module takes a microsecond each
        pushed, size = state["pushed"].unsqueeze(-1), state["embeddings"].shape[1]
        return state["sums"] / pushed.clamp(1, size), state["pushed"] > 0

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stored embeddings, drawn class-balanced: a class first, alike among those with entries, then one of its own.

        Args:
            uniform: (n, 2) float32 in [0, 1).

        Returns: embeddings (n, d) float32, their classes (n,) int64, and whether anything is stored, 0-dim bool (where
            not, the embeddings are zeros of class 0). Never waits for the device.
        """
        counts = self.counts
        filled = counts > 0
        rank = (uniform[:, 0] * filled.sum()).long()  # among the classes with entries
        # Before rounding a product of two float32 numbers may reach its upper end.
        rank = torch.minimum(rank, (filled.sum() - 1).clamp_min(0))
        classes = torch.searchsorted(filled.cumsum(0), rank + 1).clamp_max(len(counts) - 1)
        classes = torch.where(filled.any(), classes, 0)
        slots = torch.minimum((uniform[:, 1] * counts[classes]).long(), (counts[classes] - 1).clamp_min(0))
        return self.embeddings[classes, slots], classes, filled.any()

    def push(self, candidates: Tensor, classes: Tensor, confidences: Tensor, mask: Tensor, rows: Tensor) -> None:
        """One step: offer the candidates in order, then decay if due.

        Args:
            candidates: (n, d) float32, without gradient. classes: (n,) int64 in [0, K). confidences: (n,) float32,
            >= 0. mask: (n,) bool, False where the candidate is to be skipped and its class and confidence not read.
            rows: (n,) int64, the row of train.npy each candidate was made of.

        Raises: ValueError for another shape or dtype; on the CPU also for a negative or NaN confidence, and IndexError
            for a class out of range. The bank is then as it was. (On a GPU, where saying so would have to wait for the
            device, such a candidate is dropped.) UserError where no kernel runs on the GPU.
        """
        state: dict[str, Any] = self._buffers
        count, width = classes.shape[0], state["embeddings"].shape[2]
        _check("candidates", candidates, (count, width), torch.float32)
        _check("classes", classes, (count,), torch.int64)
        _check("confidences", confidences, (count,), torch.float32)
        _check("mask", mask, (count,), torch.bool)
        _check("rows", rows, (count,), torch.int64)
        # The registered op's bookkeeping takes several times as long as the push itself, where nobody watches.
        watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        run = push if watched or not candidates.is_cpu else scatter_cpu.push
        run(
            state["embeddings"],
            state["confidences"],
            state["rows"],
            state["sums"],
            state["pushed"],
            state["steps"],
            candidates.contiguous(),
            classes.contiguous(),
            confidences.contiguous(),
            mask.contiguous(),
            rows.contiguous(),
            self.beta,
            self.decay_every,
            self.rule == "fifo",
            self.RESUM_EVERY,
        )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}.")
