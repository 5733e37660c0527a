"""The same run as one, two and three processes, by the trainer's own main.

python -m tests.semi_fast.process_runs FOLDER DATA
python -m tests.semi_fast.process_runs FOLDER DATA METHODS NAME    method NAME of the folder METHODS, as one and two

Processes are forked from one that has imported everything, which takes longer than the runs themselves. Each leaves
FOLDER/<processes>-<rank>.pt: the method's state, the averaged weights, and the confusion matrix.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel imports it, which takes long

from semi_fast import methods, train
from semi_fast.run.run import Run

GLOBAL_BATCH, STEPS = 12, 8
# The learning rate is small: at the usual one, the first steps of a fresh network double a difference many times over
# (1e-7 in the weights is 3e-4 in the loss five steps later, in one process alone), and nothing could be compared.
SETTINGS = [
    *("threads=1", "wandb=off", "precision=fp32", "ceiling=off", f"steps={STEPS}", "log_every=1", "eval_every=4"),
    *("save_every=4", "optim.lr=0.0003"),
]
SEMI = ["method.tau=0.24", "method.bank_size=6", "method.decay_every=3"]


def keep_what_is_left(folder: Path, world: int, rank: int) -> None:
    """Let the run write down how it ends on this rank."""
    finish = Run.finish

    def kept(self):
        summary, trainer = finish(self), self.trainer
        left = {
            "method": trainer.method.state_dict(),
            "ema": trainer.ema.state_dict(),
            "confusion": torch.tensor(summary.confusion),
            "labeled": torch.from_numpy(self.data.labeled[0]),
        }
        torch.save(left, folder / f"{world}-{rank}.pt")
        return summary

    Run.finish = kept


def become(world: int, rank: int, port: int) -> None:
    """Set what a launcher would."""
    if world > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in (numbers | address).items()})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder: Path, data: str, world: int, *more: str) -> None:
    """Fork `world` ranks, let them train, and exit with 1 when one of them fails."""
    port, children = free_port(), []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            become(world, rank, port)
            keep_what_is_left(folder, world, rank)
            where = [f"data={data}", f"run_dir={folder}/{world}", f"batch={GLOBAL_BATCH // world}"]
            train.main(["digits_lt", str(folder / "protocol.yaml"), *where, *SETTINGS, *more])
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(1)


if __name__ == "__main__":
    place, images, *method = sys.argv[1:]
    (Path(place) / "protocol.yaml").write_text(f"protocol: P-TEST\nbatch: {GLOBAL_BATCH}\n")
    if method:
        methods.__path__ = [*methods.__path__, method[0]]
    for processes in (1, 2) if method else (1, 2, 3):
        run(Path(place), images, processes, *([f"method={method[1]}"] if method else SEMI))
