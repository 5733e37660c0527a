"""Histories of a memory bank, of any sizes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from semi_fast.memory_bank import MemoryBank
from tests.semi_fast.bank_cases import candidates, pair
from tests.semi_fast.bank_oracle import OracleBank


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
