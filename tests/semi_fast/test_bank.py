"""The memory bank equals the plain loop to the bit, keeps its prototypes, and is an ordinary op for torch.compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semi_fast.memory_bank import MemoryBank, scatter_cpu, scatter_torch
from semi_fast.memory_bank import bank as bank_module
from tests.semi_fast.bank_oracle import OracleBank
from tests.semi_fast.sync_trap import SyncTrap

SERIAL, PARALLEL = 1 << 60, 0


def candidates(rng, rows, num_classes, width, *, levels, on):
    """Random candidates; few confidence levels make ties, classes drawn unevenly make some absent."""
    classes = np.minimum(rng.geometric(0.4, rows) - 1, num_classes - 1)
    confidences = (rng.integers(1, levels + 1, rows) / levels).astype(np.float32)
    embeddings, mask = rng.normal(size=(rows, width)).astype(np.float32), rng.random(rows) < on
    return embeddings, classes, confidences, mask, rng.integers(0, 2**62, rows)


def as_tensors(step):
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in step)


def assert_same(bank: MemoryBank, oracle: OracleBank):
    np.testing.assert_array_equal(bank.counts.numpy(), oracle.counts)
    np.testing.assert_array_equal(bank.confidences.numpy(), oracle.confidences)
    np.testing.assert_array_equal(bank.embeddings.numpy(), oracle.embeddings)
    np.testing.assert_array_equal(bank.rows.numpy(), oracle.rows)
    np.testing.assert_array_equal(bank.sums.numpy(), oracle.sums)
    assert bank.steps.tolist() == [oracle.steps] * len(oracle.counts)


def pair(num_classes, width, *, size, decay_every, rule="confidence", resum_every=1024, beta=0.9):
    bank = MemoryBank(num_classes, width, size=size, beta=beta, decay_every=decay_every, rule=rule)
    bank.RESUM_EVERY = resum_every
    return bank, OracleBank(
        num_classes, width, size=size, beta=beta, decay_every=decay_every, rule=rule, resum_every=resum_every
    )


@pytest.mark.parametrize("kernel", ["serial", "parallel", "torch"])
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_equals_the_plain_loop_to_the_bit(kernel, data):
    draw = data.draw
    num_classes, size = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    width = draw(st.sampled_from([1, 3, 16, 17, 33, 40]))
    bank, oracle = pair(
        num_classes,
        width,
        size=size,
        decay_every=draw(st.integers(1, 4)),
        rule=draw(st.sampled_from(["confidence", "fifo"])),
        resum_every=draw(st.integers(1, 12)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels, on = draw(st.sampled_from([1, 3, 10**6])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter_cpu, "PARALLEL_FLOATS", PARALLEL if kernel == "parallel" else SERIAL)
        if kernel == "torch":
            patch.setattr(scatter_cpu, "push", scatter_torch.push)
        for rows in draw(st.lists(st.integers(0, 30), min_size=1, max_size=8)):
            step = candidates(rng, rows, num_classes, width, levels=levels, on=on)
            bank.push(*as_tensors(step))
            oracle.push(*step)
            assert_same(bank, oracle)


@pytest.mark.parametrize("rule", ["confidence", "fifo"])
def test_equals_the_plain_loop_at_the_paper_sizes(rule):
    bank, oracle = pair(10, 128, size=128, decay_every=3, rule=rule, resum_every=200)
    rng = np.random.default_rng(0)
    for _ in range(30):
        step = candidates(rng, 128, 10, 128, levels=10**6, on=0.8)
        bank.push(*as_tensors(step))
        oracle.push(*step)
    assert max(oracle.taken) > 400, "the head class must have been replaced often"
    assert_same(bank, oracle)


def test_prototype_sums_stay_within_the_stated_bound_after_100_000_updates():
    rows, width, size, steps = 64, 8, 16, 1600
    bank = MemoryBank(1, width, size=size, decay_every=1, beta=0.5)  # every candidate finds a lower confidence
    generator = torch.Generator().manual_seed(0)
    largest, worst = 0.0, 0.0
    for step in range(steps):
        offered = torch.randn(rows, width, generator=generator) * 100
        confident = 0.5 + torch.arange(rows) / (4 * rows)
        zero = torch.zeros(rows, dtype=torch.int64)
        bank.push(offered, zero, confident, zero == 0, zero)
        largest = max(largest, float(offered.abs().max()))
        if step % 16 == 0:
            exact = bank.embeddings[0].double().mean(0)
            worst = max(worst, float((bank.prototypes()[0][0] - exact).abs().max()))
    assert bank.pushed.item() >= 100_000
    bound = 2 * (bank.RESUM_EVERY + rows) * 2**-24 * (size + 2) / size * largest
    assert 0 < worst <= bound


def test_a_full_class_replaces_exactly_the_lowest_and_ties_go_to_the_lowest_slot():
    bank = MemoryBank(1, 1, size=3, decay_every=100)
    zero = torch.zeros(3, dtype=torch.int64)
    bank.push(torch.tensor([[1.0], [2.0], [3.0]]), zero, torch.tensor([0.8, 0.7, 0.7]), zero == 0, zero)
    bank.push(torch.tensor([[4.0], [5.0], [6.0]]), zero, torch.tensor([0.7, 0.9, 0.75]), zero == 0, torch.arange(3) + 7)
    assert bank.rows.tolist() == [[0, 8, 9]]
    assert bank.embeddings.flatten().tolist() == [1.0, 5.0, 6.0]
    assert bank.prototypes()[0].item() == 4.0


def test_decay_comes_after_the_push_and_touches_all_stored_confidences():
    bank = MemoryBank(2, 1, size=2, beta=0.5, decay_every=2)
    zero = torch.zeros(1, dtype=torch.int64)
    step = torch.ones(1, 1), zero, torch.tensor([0.8]), torch.tensor([True]), zero
    bank.push(*step)
    assert bank.confidences[0].tolist() == pytest.approx([0.8, 0.0])
    bank.push(*step)
    assert bank.confidences[0].tolist() == pytest.approx([0.4, 0.4])
    assert bank.confidences[1].tolist() == [0.0, 0.0]


def test_classes_without_entries_have_no_prototype():
    bank = MemoryBank(3, 2)
    bank.push(torch.ones(1, 2), torch.tensor([1]), torch.tensor([0.9]), torch.tensor([True]), torch.tensor([5]))
    prototypes, filled = bank.prototypes()
    assert filled.tolist() == [False, True, False]
    assert prototypes.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_reading_prototypes_is_not_changed_by_a_later_push():
    bank = MemoryBank(1, 1)
    step = torch.tensor([0]), torch.tensor([0.9]), torch.tensor([True]), torch.tensor([5])
    bank.push(torch.tensor([[2.0]]), *step)
    before, _ = bank.prototypes()
    bank.push(torch.tensor([[4.0]]), *step)
    assert before.item() == 2.0
    assert bank.prototypes()[0].item() == 3.0


def test_state_dict_carries_the_bank_over():
    bank, oracle = pair(3, 4, size=5, decay_every=2, rule="fifo", resum_every=4)
    other, _ = pair(3, 4, size=5, decay_every=2, rule="fifo", resum_every=4)
    rng = np.random.default_rng(0)
    steps = [candidates(rng, 20, 3, 4, levels=5, on=0.9) for _ in range(6)]
    for step in steps[:3]:
        bank.push(*as_tensors(step))
        oracle.push(*step)
    other.load_state_dict(bank.state_dict())
    for step in steps[3:]:
        other.push(*as_tensors(step))
        oracle.push(*step)
    assert_same(other, oracle)


def test_non_contiguous_candidates_are_taken_by_value():
    bank, other = MemoryBank(2, 6), MemoryBank(2, 6)
    rows = torch.randn(8, 12)
    labels = torch.arange(8) % 2, torch.rand(8), torch.ones(8, dtype=torch.bool), torch.arange(8)
    bank.push(rows[:, ::2], *labels)
    other.push(rows[:, ::2].clone(), *labels)
    assert torch.equal(bank.embeddings, other.embeddings)
    assert bank.embeddings.abs().sum() > 0


@pytest.mark.parametrize(
    ("which", "wrong"),
    [
        (0, torch.zeros(4, 3)),
        (0, torch.zeros(4, 2).double()),
        (1, torch.zeros(4)),
        (2, torch.zeros(3)),
        (3, torch.ones(4)),
        (4, torch.zeros(4)),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(which, wrong):
    zero = torch.zeros(4, dtype=torch.int64)
    step = [torch.zeros(4, 2), zero, torch.zeros(4), zero == 0, zero]
    step[which] = wrong
    bank = MemoryBank(2, 2)
    with pytest.raises(ValueError, match="must be torch"):
        bank.push(*step)
    assert bank.steps.tolist() == [0, 0]


def test_a_class_out_of_range_is_refused_before_anything_changes():
    bank = MemoryBank(2, 1)
    with pytest.raises(IndexError, match="out of range"):
        bank.push(torch.ones(2, 1), torch.tensor([0, 2]), torch.ones(2), torch.tensor([True, True]), torch.arange(2))
    assert bank.counts.tolist() == [0, 0]
    bank.push(torch.ones(2, 1), torch.tensor([0, -1]), torch.ones(2), torch.tensor([True, False]), torch.arange(2))
    assert bank.counts.tolist() == [1, 0]


@pytest.mark.parametrize("confidence", [-0.5, float("nan")])
def test_a_confidence_that_is_none_is_refused_before_anything_changes(confidence):
    bank = MemoryBank(2, 1)
    offered = torch.ones(2, 1), torch.tensor([0, 1]), torch.tensor([0.5, confidence])
    with pytest.raises(ValueError, match="negative or not a number"):
        bank.push(*offered, torch.tensor([True, True]), torch.arange(2))
    assert bank.counts.tolist() == [0, 0]
    bank.push(*offered, torch.tensor([True, False]), torch.arange(2))
    assert bank.counts.tolist() == [1, 0]


def op_arguments(rows):
    bank = MemoryBank(3, 4, size=2)
    state = [getattr(bank, name) for name in bank_module.MUTATED]
    step = as_tensors(candidates(np.random.default_rng(0), rows, 3, 4, levels=9, on=0.7))
    return (*state, *step, 0.99, 2, False, 1024)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_the_registered_op_passes_opcheck(rows):
    torch.library.opcheck(bank_module.push, op_arguments(rows))


def test_a_compiled_push_equals_the_eager_one():
    bank, compiled = MemoryBank(3, 4, size=2, decay_every=2), MemoryBank(3, 4, size=2, decay_every=2)
    run = torch.compile(compiled.push, fullgraph=True, backend="aot_eager")
    rng = np.random.default_rng(0)
    for _ in range(4):
        step = as_tensors(candidates(rng, 9, 3, 4, levels=9, on=0.7))
        bank.push(*step)
        run(*step)
    assert bank.counts.sum() > 0
    for name in bank_module.MUTATED:
        assert torch.equal(getattr(bank, name), getattr(compiled, name)), name


def test_the_version_in_tensor_operations_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(scatter_cpu, "push", scatter_torch.push)
    bank, _ = pair(3, 4, size=2, decay_every=1, rule="confidence", resum_every=3)
    step = as_tensors(candidates(np.random.default_rng(0), 12, 3, 4, levels=3, on=0.7))
    with SyncTrap():
        bank.push(*step)
    assert bank.counts.sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["confidence", "fifo"])
def test_a_gpu_keeps_the_same_bank(rule):
    bank, oracle = pair(10, 32, size=16, decay_every=3, rule=rule, resum_every=50)
    bank = bank.cuda()
    rng = np.random.default_rng(0)
    for _ in range(10):
        step = candidates(rng, 64, 10, 32, levels=10**6, on=0.8)
        bank.push(*(part.cuda() for part in as_tensors(step)))
        oracle.push(*step)
    assert_same(bank.cpu(), oracle)
