"""A memory bank beside its plain loop, what is offered to both, and what every kernel is asked.

Without the libraries of tests: a card's machine may lack them.
"""

from __future__ import annotations

import numpy as np
import torch

from semi_fast.memory_bank import MemoryBank
from tests.semi_fast.bank_oracle import OracleBank

BITS = {"embeddings": np.int32, "confidences": np.int32, "rows": np.int64, "sums": np.int32}


def candidates(rng, rows, num_classes, width, *, levels, on, spread="uneven"):
    """Random candidates; few confidence levels make ties, classes drawn unevenly make some absent."""
    classes = {
        "uneven": np.minimum(rng.geometric(0.4, rows) - 1, num_classes - 1),
        "one": np.full(rows, rng.integers(num_classes)),
        "even": rng.integers(0, num_classes, rows),
    }[spread].astype(np.int64)
    # Level 0: nothing but zeros, of both signs.
    confidences = rng.integers(1, levels + 1, rows) / levels if levels else rng.choice([0.0, -0.0], rows)
    embeddings = rng.normal(size=(rows, width)) * 10.0 ** rng.integers(-3, 4, (rows, 1))
    mask = rng.random(rows) < on
    classes[~mask] = rng.choice([-1, num_classes, 2**40])  # what is masked out is not read
    return embeddings.astype(np.float32), classes, confidences.astype(np.float32), mask, rng.integers(0, 2**62, rows)


def as_tensors(step):
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in step)


def assert_same(bank: MemoryBank, oracle: OracleBank):
    for name, bits in BITS.items():
        ours, theirs = getattr(bank, name).numpy(), getattr(oracle, name)
        np.testing.assert_array_equal(ours.view(bits), theirs.view(bits), err_msg=name)
    np.testing.assert_array_equal(bank.counts.numpy(), oracle.counts)
    np.testing.assert_array_equal(bank.pushed.numpy(), oracle.taken)
    assert bank.steps.tolist() == [oracle.steps] * len(oracle.counts)


def pair(num_classes, width, *, size, decay_every, rule="confidence", resum_every=1024, beta=0.9):
    bank = MemoryBank(num_classes, width, size=size, beta=beta, decay_every=decay_every, rule=rule)
    bank.RESUM_EVERY = resum_every
    return bank, OracleBank(
        num_classes, width, size=size, beta=beta, decay_every=decay_every, rule=rule, resum_every=resum_every
    )
