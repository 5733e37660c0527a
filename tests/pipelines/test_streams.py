"""Streams of a method's choice: which rows they read, in which order, in which views, and how a step is counted."""

import contextlib
import hashlib
import shutil

import numpy as np
import pytest
import torch

from pipelines import Batch, Group, Sizes, Stream
from pipelines.augment.plan import Planner
from pipelines.augment.views import VIEWS
from pipelines.order import by_class, part_number, plan_seed
from tests.pipelines import folders
from tests.pipelines.test_backends import open_tiny, same, standard, stored_pixels, take

#: Of the first 3 batches at seed 7, as the code gave them that knew of two streams alone.
RECORDED = "22529594a275e143978d33e62b9fec1c7a5b8e819942e91b18c90e0f0185cb70"

MANY = {
    "labeled": Stream("labeled", ("weak",)),
    "again": Stream("labeled", ("strong", "strong", "plain"), balanced=True, batch=5),
    "unlabeled": Stream("unlabeled", ("plain", "strong")),
    "every": Stream("all", ("plain",)),
}


@pytest.fixture(params=["resident", "ffcv"])
def backend(request):
    """The back ends that serve any stream."""
    return request.param


def partial_folder(folder, tmp_path):
    """A copy whose unlabeled rows are 6..29, half of which are labeled as well."""
    copy = shutil.copytree(folder, tmp_path / "partial")
    np.save(copy / "unlabeled_rows.npy", np.arange(6, 30))
    folders.refresh_manifest(copy)
    return copy


def test_the_standard_streams_keep_their_batches_to_the_bit(backend, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    folders.refresh_manifest(copy, mean=[0.5, 0.25, 0.5], std=[0.25, 0.5, 0.25])
    digest = hashlib.sha256()
    for batch in take(open_tiny(copy, backend, ("weak", "strong", "strong"), mu=2), 3):
        digest.update(batch.images.permute(0, 2, 3, 1).numpy().astype("<f4").tobytes())
        for numbers in (batch.labels["labeled"], batch.rows["unlabeled"]):
            digest.update(numbers.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == RECORDED


def test_every_stream_reads_its_part_in_its_views(backend, data, stored, tmp_path):
    loaders = open_tiny(partial_folder(data, tmp_path), backend, streams=MANY, mu=3)
    seen = {name: set() for name in MANY}
    for batch in take(loaders, 20):
        assert batch.groups == (
            ("labeled", "weak", 4), ("again", "strong", 10), ("again", "plain", 5),
            ("unlabeled", "plain", 12), ("unlabeled", "strong", 12), ("every", "plain", 4),
        )  # fmt: skip
        assert len(batch.images) == sum(group.rows for group in batch.groups)
        assert batch.labels.keys() == {"labeled", "again"}
        for name, labels in batch.labels.items():
            np.testing.assert_array_equal(labels, batch.rows[name] % folders.CLASSES)
        for name in ("again", "unlabeled", "every"):
            pixels = stored_pixels(loaders, batch.of(name, "plain"))
            np.testing.assert_array_equal(pixels, stored[batch.rows[name].numpy()])
        for name, rows in batch.rows.items():
            seen[name] |= set(rows.tolist())
    assert seen == {
        "labeled": set(range(12)), "again": set(range(12)), "unlabeled": set(range(6, 30)), "every": set(range(30))
    }  # fmt: skip


def test_all_reads_every_row_once_an_epoch(folder, tmp_path):
    loaders = open_tiny(partial_folder(folder, tmp_path), "resident", streams={"a": Stream("all", ("plain",), batch=5)})
    assert sorted(torch.cat([batch.rows["a"] for batch in take(loaders, 6)]).tolist()) == list(range(30))


def test_a_stream_does_not_depend_on_the_others(backend, data):
    joint = take(open_tiny(data, backend, streams=MANY), 5)
    for name, stream in MANY.items():
        for together, alone in zip(joint, take(open_tiny(data, backend, streams={name: stream}), 5), strict=True):
            assert torch.equal(together.rows[name], alone.rows[name])
            for view in stream.views:
                assert torch.equal(together.of(name, view), alone.of(name, view))


def test_streams_of_one_part_differ_by_their_names(folder):
    streams = {name: Stream("labeled", ("strong",), batch=12) for name in ("labeled", "second", "third")}
    batch = next(open_tiny(folder, "resident", streams=streams).train())
    orders = {tuple(batch.rows[name].tolist()) for name in streams}
    assert len(orders) == 3
    assert all(sorted(order) == list(range(12)) for order in orders)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_have_the_streams_of_one_process(backend, data, world):
    streams = {name: stream._replace(batch=6) for name, stream in MANY.items()}
    shares = {name: stream._replace(batch=6 // world) for name, stream in MANY.items()}
    alone = take(open_tiny(data, backend, streams=streams), 4)
    ranks = [take(open_tiny(data, backend, streams=shares, rank=rank, world=world), 4) for rank in range(world)]
    for whole, *together in zip(alone, *ranks, strict=True):
        for name, stream in streams.items():
            assert torch.equal(torch.cat([batch.rows[name] for batch in together]), whole.rows[name])
            for view in set(stream.views):
                count = stream.views.count(view)
                parts = zip(*[batch.of(name, view).chunk(count) for batch in together], strict=True)
                assert torch.equal(torch.cat([torch.cat(part) for part in parts]), whole.of(name, view))


def test_the_plans_of_a_stream_come_from_its_name_seed_and_step(folder, stored):
    views = [VIEWS["strong"]] * 2
    loaders = open_tiny(folder, "resident", streams={"mine": Stream("all", ("strong", "strong"))})
    planner = Planner([*views, VIEWS["plain"]], 16, 16)
    for step in (0, 3):
        batch = take(loaders, 1, start=step)[0]
        generator = torch.Generator().manual_seed(plan_seed(7, part_number("mine"), step))
        plan = torch.from_numpy(planner.sample_all(views, 4, generator))
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (loaders.info.mean, loaders.info.std))
        tensors = (torch.from_numpy(stored), batch.rows["mine"].repeat(2), plan, planner.table, mean, std)
        assert torch.equal(torch.ops.semi_fast.augment(*tensors, torch.float32, 1), batch.images)


def test_a_relabelled_stream_reads_the_new_rows_from_the_next_train_on(backend, data, stored):
    streams = {"labeled": Stream("labeled", ("plain",)), "even": Stream("labeled", ("plain",), balanced=True)}
    loaders = open_tiny(data, backend, streams=streams)
    before = loaders.train()
    first = next(before)
    rows, labels = np.array([40, 41, 42, 3]), np.array([2, 2, 0, 2])
    loaders.relabel(rows, labels)
    for given, now in zip((rows, labels), loaders.labeled, strict=True):
        np.testing.assert_array_equal(given, now)
    given = dict(zip(rows.tolist(), labels.tolist(), strict=True))
    rows[:] = 0  # the loaders have their copy
    untouched = take(open_tiny(data, backend, streams=streams), 5)
    assert same(first, untouched[0])
    assert all(same(next(before), batch) for batch in untouched[1:])
    classes = []
    for batch in take(loaders, 200):
        for name in streams:
            assert batch.labels[name].tolist() == [given[row] for row in batch.rows[name].tolist()]
        np.testing.assert_array_equal(
            stored_pixels(loaders, batch.of("labeled", "plain")), stored[batch.rows["labeled"].numpy()]
        )
        assert sorted(batch.rows["labeled"].tolist()) == [3, 40, 41, 42]
        classes += batch.labels["even"].tolist()
    assert abs(np.mean(np.array(classes) == 0) - 0.5) < 0.1


def test_relabelling_is_a_pure_function_of_rows_seed_and_step(folder):
    rows, labels = np.arange(20), np.arange(20) % 3
    one, other = open_tiny(folder, "resident"), open_tiny(folder, "resident")
    take(one, 7)
    for loaders in (one, other):
        loaders.relabel(rows, labels)
    whole = take(one, 9)
    assert all(same(a, b) for a, b in zip(whole[6:], take(other, 3, start=6), strict=True))


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([50], [0], r"rows must be within 0..49, got 50..50"),
        ([-1], [0], r"rows must be within 0..49, got -1..-1"),
        ([0], [3], r"labels must be within 0..2, got 3..3"),
        ([0], [-1], r"labels must be within 0..2, got -1..-1"),
        ([], [], r"n at least 1, got \(0,\) and \(0,\)"),
        ([0, 1], [0], r"got \(2,\) and \(1,\)"),
    ],
)
def test_rows_and_labels_out_of_range_are_refused(folder, rows, labels, message):
    loaders = open_tiny(folder, "resident")
    with pytest.raises(ValueError, match=message):
        loaders.relabel(np.array(rows, np.int64), np.array(labels, np.int64))
    np.testing.assert_array_equal(loaders.labeled[0], np.arange(12)[::-1])


def test_the_loaders_say_what_is_labeled_and_what_is_not(folder, tmp_path):
    loaders = open_tiny(partial_folder(folder, tmp_path), "resident")
    np.testing.assert_array_equal(loaders.labeled[0], np.arange(12)[::-1])
    np.testing.assert_array_equal(loaders.labeled[1], np.arange(12)[::-1] % folders.CLASSES)
    np.testing.assert_array_equal(loaders.unlabeled_rows, np.arange(6, 30))


def test_plain_views_of_any_rows_in_order(backend, data, stored):
    loaders = open_tiny(data, backend)
    rows = np.array([30, 3, 3, 49, 0])
    views = list(loaders.plain(rows, 2))
    assert [len(view) for view in views] == [2, 2, 1]
    np.testing.assert_array_equal(stored_pixels(loaders, torch.cat(views)), stored[rows])
    assert list(loaders.plain(rows[:0], 2)) == []
    with pytest.raises(ValueError, match=r"rows must be within 0..49, got 0..50"):
        loaders.plain(np.array([0, 50]), 2)


def test_making_views_is_timed_by_who_wants_to(folder):
    phases = []

    @contextlib.contextmanager
    def phase(name):
        phases.append(name)
        yield

    loaders = open_tiny(folder, "resident", phase=phase)
    next(loaders.train())
    assert set(phases) == {"augment"}


def test_a_batch_of_some_of_its_groups(folder):
    batch = next(open_tiny(folder, "resident", ("weak", "strong", "strong")).train())
    first = batch.only(("unlabeled", "weak"), ("labeled", "weak"))
    assert first.groups == batch.groups[:2]
    assert first.images.data_ptr() == batch.images.data_ptr(), "not copied"
    assert len(first.images) == sum(group.rows for group in first.groups)
    others = batch.only(("labeled", "weak"), ("unlabeled", "strong"))
    for group in others.groups:
        assert torch.equal(others.of(*group[:2]), batch.of(*group[:2]))
    assert others.images.is_contiguous(memory_format=torch.channels_last)
    assert others.rows is batch.rows
    none = batch.only()
    assert (none.groups, len(none.images)) == ((), 0)
    with pytest.raises(KeyError, match=r"not all of \[\('labeled', 'strong'\)\]"):
        batch.only(("labeled", "strong"))


def test_a_batch_takes_a_further_group_at_its_end(folder):
    batch = next(open_tiny(folder, "resident", ("weak", "strong", "strong")).train())
    mixed = batch.of("labeled", "weak").flip(0)
    more = batch.add("labeled", "mixed", mixed).add("mixed", "weak", mixed[:1])
    assert more.groups == (*batch.groups, Group("labeled", "mixed", 4), Group("mixed", "weak", 1))
    assert torch.equal(more.images, torch.cat((batch.images, mixed, mixed[:1])))
    assert more.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(more.of("labeled", "mixed"), mixed)
    assert torch.equal(more.of("unlabeled", "strong"), batch.of("unlabeled", "strong"))
    assert isinstance(more, Batch)
    with pytest.raises(ValueError, match="the batch has a view 'weak' of the stream 'labeled' already"):
        more.add("labeled", "weak", mixed)
    with pytest.raises(KeyError, match="the batch has no view 'weak' of a stream 'unlabelled'"):
        more.of("unlabelled", "weak")


def test_the_sizes_of_a_step_are_derived_once():
    sizes = Sizes(MANY, batch=4, mu=3, world=2)
    assert {name: sizes.of(name) for name in MANY} == {"labeled": 4, "again": 5, "unlabeled": 12, "every": 4}
    assert sizes.images_per_step == sizes.images_without(()) == 2 * (4 + 3 * 5 + 2 * 12 + 4)
    assert sizes.samples_per_step == 2 * (4 + 5 + 12 + 4)
    assert sizes.labeled_per_step == 2 * 4
    assert Sizes(standard(()), 64, 7, 1).images_per_step == 64
    assert Sizes({"a": MANY["every"]}, 64, 7, 1).labeled_per_step == 0


def test_images_are_sorted_by_class():
    classes = by_class(np.array([5, 0, 5, 2, 0, 5]))
    assert classes.indices.tolist() == [1, 4, 3, 0, 2, 5]
    assert classes.first.tolist() == [0, 2, 3]
    assert classes.counts.tolist() == [2, 1, 3]
