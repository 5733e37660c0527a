"""Histories of a memory bank and what every kernel is asked about them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from semi_fast.memory_bank import MemoryBank
from tests.semi_fast.bank_oracle import OracleBank

BITS = {"embeddings": np.int32, "confidences": np.int32, "rows": np.int64, "sums": np.int32}


class Case(NamedTuple):
    """A bank, how it is set up, and what is pushed into it."""

    bank: MemoryBank
    oracle: OracleBank
    steps: list  # of candidates, classes, confidences, mask, rows


@st.composite
def cases(draw, *, most_classes=5, most_rows=30, most_steps=8, widths=(1, 3, 16, 17, 33, 40)):
    """Any sizes; masks all on, all off or mixed; ties; absent classes; batches of one class; banks that decay to 0."""
    num_classes, width = draw(st.integers(1, most_classes)), draw(st.sampled_from(widths))
    bank, oracle = pair(
        num_classes,
        width,
        size=draw(st.integers(1, 7)),
        decay_every=draw(st.integers(1, 4)),
        rule=draw(st.sampled_from(["confidence", "fifo"])),
        resum_every=draw(st.integers(1, 12)),
        beta=draw(st.sampled_from([0.9, 1.0, 1e-3])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from(["uneven", "one", "even"]))
    levels, on = draw(st.sampled_from([0, 1, 3, 10**6])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    counts = draw(st.lists(st.integers(0, most_rows), min_size=1, max_size=most_steps))
    steps = [candidates(rng, rows, num_classes, width, levels=levels, on=on, spread=spread) for rows in counts]
    return Case(bank, oracle, steps)


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
