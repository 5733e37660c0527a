"""The memory bank equals the plain loop to the bit, keeps its prototypes, and is an ordinary op for torch.compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from data_prep.errors import UserError
from semi_fast.memory_bank import MemoryBank, scatter_cpu
from semi_fast.memory_bank import bank as bank_module
from tests.semi_fast.bank_cases import as_tensors, assert_same, candidates, pair
from tests.semi_fast.bank_histories import cases

SERIAL, PARALLEL = 1 << 60, 0


@pytest.mark.parametrize("threshold", [SERIAL, PARALLEL])
@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_equals_the_plain_loop_to_the_bit(threshold, case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter_cpu, "PARALLEL_FLOATS", threshold)
        for step in case.steps:
            case.bank.push(*as_tensors(step))
            case.oracle.push(*step)
            assert_same(case.bank, case.oracle)


@pytest.mark.parametrize("rule", ["confidence", "fifo"])
def test_a_long_run_of_pushes_and_decays_equals_the_plain_loop(rule):
    bank, oracle = pair(4, 5, size=6, decay_every=1, rule=rule, resum_every=40, beta=0.7)
    rng = np.random.default_rng(0)
    for turn in range(700):
        rows = int(rng.integers(0, 9)) if turn % 350 < 20 else 0  # decays alone, until nothing is left
        step = candidates(rng, rows, 4, 5, levels=50, on=0.8)
        bank.push(*as_tensors(step))
        oracle.push(*step)
        assert_same(bank, oracle)
        if turn == 270:
            assert 0 < bank.confidences.max() < torch.finfo(torch.float32).smallest_normal
    assert oracle.taken[0] > 40


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


def test_a_bank_says_before_a_run_whether_its_device_has_a_kernel(monkeypatch):
    monkeypatch.setattr(bank_module.cuda_launch, "fault", lambda device: f"no kernel on {device}")
    MemoryBank(3, 4).check_device()
    with FakeTensorMode(), torch.device("cuda", 0):
        bank = MemoryBank(3, 4)
    with pytest.raises(UserError, match="no kernel on cuda:0"):
        bank.check_device()


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
