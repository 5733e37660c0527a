"""What every back end must do: the same rows in the same order, resumable, sharded, clean when left early."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from pipelines import Batch, Loaders, Stream, open_loaders, read_info
from tests.pipelines import folders

CPU = torch.device("cpu")


def standard(views=("plain",), labeled=("weak",)) -> dict[str, Stream]:
    """The two usual streams, or the labeled one alone where no view of unlabeled images is named."""
    streams = {"labeled": Stream("labeled", labeled)}
    return streams | {"unlabeled": Stream("unlabeled", views)} if views else streams


def open_tiny(folder: Path, backend: str, views=("plain",), labeled=("weak",), streams=None, **options) -> Loaders:
    settings = {"batch": 4, "seed": 7, "device": CPU, "dtype": torch.float32} | options
    return open_loaders(folder, streams or standard(views, labeled), backend=backend, **settings)


def take(loaders: Loaders, steps: int, start: int = 0) -> list[Batch]:
    batches = loaders.train(start)
    return [next(batches) for _ in range(steps)]


def stored_pixels(loaders: Loaders, images: torch.Tensor) -> np.ndarray:
    """Undo the normalization of float32 images: (N, H, W, 3) uint8."""
    mean, std = np.array(loaders.info.mean), np.array(loaders.info.std)
    return np.rint((images.permute(0, 2, 3, 1).numpy() * std + mean) * 255).astype(np.uint8)


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.images, *batch.labels.values(), *batch.rows.values()]


def same(a: Batch, b: Batch) -> bool:
    names = a.groups == b.groups and a.labels.keys() == b.labels.keys() and a.rows.keys() == b.rows.keys()
    return names and all(torch.equal(one, other) for one, other in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_what_the_network_takes(backend, data, dtype):
    loaders = open_tiny(data, backend, ("weak", "strong", "strong"), mu=3, dtype=dtype)
    assert loaders.backend == backend
    batch = next(loaders.train())
    assert isinstance(batch, Batch)
    assert batch.groups == (("labeled", "weak", 4), ("unlabeled", "weak", 12), ("unlabeled", "strong", 24))
    assert loaders.sizes.groups == batch.groups
    assert batch.images.shape == (40, 3, 16, 16)
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert {name: tuple(y.shape) for name, y in batch.labels.items()} == {"labeled": (4,)}
    assert {name: tuple(rows.shape) for name, rows in batch.rows.items()} == {"labeled": (4,), "unlabeled": (12,)}
    assert all(t.dtype == torch.int64 for t in (*batch.labels.values(), *batch.rows.values()))
    labeled, weak, strong = batch.images.split([4, 12, 24])
    for view, part in (("weak", weak), ("strong", strong)):
        assert torch.equal(batch.of("unlabeled", view), part)
        assert batch.of("unlabeled", view).data_ptr() == part.data_ptr()
    assert torch.equal(batch.of("labeled", "weak"), labeled)


def test_pixels_labels_and_row_ids_belong_together(backend, data, stored):
    loaders = open_tiny(data, backend, ("plain", "plain"), labeled=("plain",), mu=2)
    for batch in take(loaders, 20):
        x = stored_pixels(loaders, batch.of("labeled", "plain"))
        rows = folders.row_of(x)
        assert (rows < 12).all()
        np.testing.assert_array_equal(x, stored[rows])
        np.testing.assert_array_equal(batch.rows["labeled"].numpy(), rows)
        np.testing.assert_array_equal(batch.labels["labeled"].numpy(), rows % folders.CLASSES)
        for view in batch.of("unlabeled", "plain").chunk(2):
            np.testing.assert_array_equal(stored_pixels(loaders, view), stored[batch.rows["unlabeled"].numpy()])
    np.testing.assert_array_equal(loaders.hidden_labels(), np.arange(50) % folders.CLASSES)


def test_every_unlabeled_row_comes_once_an_epoch(backend, data):
    loaders = open_tiny(data, backend, batch=5)
    rows = torch.cat([batch.rows["unlabeled"] for batch in take(loaders, 20)]).reshape(2, 50)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(50))
    assert (rows[0] != rows[1]).any()


def test_resuming_at_a_step_equals_skipping_to_it(backend, data):
    options = {"views": ("weak", "strong")}
    whole = take(open_tiny(data, backend, **options), 17)
    rest = take(open_tiny(data, backend, **options), 4, start=13)
    assert all(same(a, b) for a, b in zip(whole[13:], rest, strict=True))


def test_ranks_are_disjoint_and_cover(backend, data):
    ranks = [open_tiny(data, backend, batch=5, rank=rank, world=2) for rank in range(2)]
    rows = torch.cat([batch.rows["unlabeled"] for loaders in ranks for batch in take(loaders, 5)])
    assert sorted(rows.tolist()) == list(range(50))
    first, second = (take(loaders, 1)[0] for loaders in ranks)
    assert not set(first.rows["unlabeled"].tolist()) & set(second.rows["unlabeled"].tolist())


@pytest.mark.parametrize("backend", ["resident", "ffcv"])  # DALI draws its random numbers rank by rank
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_have_the_batch_of_one_process(backend, data, world):
    views = ("weak", "strong", "strong")
    alone = take(open_tiny(data, backend, views, batch=6, mu=2), 5)
    share = {"batch": 6 // world, "mu": 2, "world": world}
    ranks = [take(open_tiny(data, backend, views, rank=rank, **share), 5) for rank in range(world)]
    for whole, *together in zip(alone, *ranks, strict=True):
        for name, count in (("labeled", 1), ("unlabeled", 1), ("unlabeled", 2)):
            view = "strong" if count == 2 else "weak"
            shares = zip(*[b.of(name, view).chunk(count) for b in together], strict=True)
            assert torch.equal(torch.cat([image for share in shares for image in share]), whole.of(name, view))
        assert torch.equal(torch.cat([b.labels["labeled"] for b in together]), whole.labels["labeled"])
        for name in ("labeled", "unlabeled"):
            assert torch.equal(torch.cat([b.rows[name] for b in together]), whole.rows[name])


@pytest.mark.parametrize("world", [2, 3, 13])
def test_ranks_share_the_test_images_without_repeating_one(backend, data, world):
    shares = [list(open_tiny(data, backend, rank=rank, world=world).test(2)) for rank in range(world)]
    images = torch.cat([x for share in shares for x, _ in share])
    labels = torch.cat([y for share in shares for _, y in share])
    np.testing.assert_array_equal(stored_pixels(open_tiny(data, backend), images), np.load(data / "test.npy"))
    assert labels.tolist() == [i % folders.CLASSES for i in range(11)]
    sizes = [sum(len(y) for _, y in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_ranks_and_views_draw_their_own_random_numbers(backend, data):
    # Both ranks read all of the labeled rows at once: what differs is the plan.
    views = ("strong", "strong")
    a, b = (take(open_tiny(data, backend, views, batch=50, rank=r, world=2), 1)[0] for r in range(2))
    views_a, views_b = (batch.of("unlabeled", "strong").chunk(2) for batch in (a, b))
    assert not torch.equal(*views_a)
    order_a, order_b = a.rows["unlabeled"].argsort(), b.rows["unlabeled"].argsort()
    assert torch.equal(a.rows["unlabeled"][order_a], b.rows["unlabeled"][order_b])
    assert not torch.equal(views_a[0][order_a], views_b[0][order_b])


def test_another_seed_gives_another_order_and_the_same_one_the_same(backend, data):
    one, again, other = (take(open_tiny(data, backend, ("strong",), seed=seed), 3) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(one, again, strict=True))
    assert any((a.rows["unlabeled"] != b.rows["unlabeled"]).any() for a, b in zip(one, other, strict=True))


def test_a_labeled_batch_larger_than_the_labeled_set_wraps_around(backend, data):
    loaders = open_tiny(data, backend, labeled=("plain",), batch=30)
    batch = next(loaders.train())
    rows = folders.row_of(stored_pixels(loaders, batch.of("labeled", "plain")))
    assert sorted(rows[:12]) == sorted(rows[12:24]) == list(range(12))
    np.testing.assert_array_equal(batch.labels["labeled"].numpy(), rows % folders.CLASSES)


def test_without_a_stream_of_them_no_unlabeled_image_is_read(backend, data):
    batch = next(open_tiny(data, backend, ()).train())
    assert batch.groups == (("labeled", "weak", 4),)
    assert batch.rows.keys() == batch.labels.keys() == {"labeled"}
    assert batch.images.shape == (4, 3, 16, 16)


def test_the_labeled_half_does_not_depend_on_the_views_asked_for(backend, data):
    alone, joint = (take(open_tiny(data, backend, views), 5) for views in ((), ("weak", "strong")))
    for a, b in zip(alone, joint, strict=True):
        assert torch.equal(a.images, b.of("labeled", "weak"))
        assert torch.equal(a.labels["labeled"], b.labels["labeled"])


def test_kept_batches_stay_as_they_were(backend, data):
    loaders = open_tiny(data, backend, ("strong",))
    kept = take(loaders, 25)
    again = take(loaders, 25)
    assert all(same(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("batch", [1, 4, 11, 256])
def test_the_test_images_come_once_in_order(backend, data, batch):
    loaders = open_tiny(data, backend)
    for _ in range(2):
        images, labels = zip(*loaders.test(batch), strict=True)
        assert [len(y) for y in labels] == [min(batch, 11 - i) for i in range(0, 11, batch)]
        np.testing.assert_array_equal(stored_pixels(loaders, torch.cat(images)), np.load(data / "test.npy"))
        assert torch.cat(labels).tolist() == [i % folders.CLASSES for i in range(11)]


def test_iterators_left_early_leak_no_thread_and_change_no_setting(backend, data, threads_before):
    before = torch.get_num_threads(), numba.get_num_threads()
    loaders = open_tiny(data, backend, ("strong",))
    for _ in range(5):
        next(loaders.train())
        next(loaders.test(2))
    held = loaders.train()
    next(held)
    held.close()
    gc.collect()
    assert threading.active_count() <= threads_before
    assert (torch.get_num_threads(), numba.get_num_threads()) == before
    loaders.close()


def test_two_iterators_do_not_disturb_each_other(backend, data):
    loaders = open_tiny(data, backend, ("strong",))
    expected = take(loaders, 6)
    one, two = loaders.train(), loaders.train(3)
    for i in range(3):
        assert same(next(one), expected[i])
        assert same(next(two), expected[i + 3])
        assert sum(len(y) for _, y in loaders.test(4)) == 11


def test_resident_and_ffcv_give_the_same_batches(folder, ffcv_folder):
    resident, ffcv = (
        take(open_tiny(where, backend, ("weak", "strong", "strong"), mu=2, dtype=torch.bfloat16), 30)
        for where, backend in ((folder, "resident"), (ffcv_folder, "ffcv"))
    )
    assert all(same(a, b) for a, b in zip(resident, ffcv, strict=True))


def test_info_says_what_the_folder_holds(folder):
    info = read_info(folder)
    assert info == open_tiny(folder, "resident").info
    assert (info.num_train, info.num_labeled, info.num_unlabeled, info.num_test, info.num_classes) == (
        50,
        12,
        50,
        11,
        3,
    )
    assert info.labeled_counts == (4, 4, 4)
    assert info.resolution == 16
    assert len(info.fingerprint) == 64


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_batches_leave_memory_and_threads_where_they_were(backend, data, count):
    import psutil

    process = psutil.Process()  # its threads are those of the system, not of Python alone
    batches = open_tiny(data, backend, ("weak", "strong")).train()
    sizes = []
    for _ in range(4):
        for _ in range(count // 4):
            next(batches)
        gc.collect()
        sizes.append((process.memory_info().rss, process.num_threads(), threading.active_count()))
    assert sizes[-1][1:] == sizes[0][1:]
    assert sizes[-1][0] - sizes[0][0] < 8 << 20


def test_what_ffcv_compiles_at_its_import_is_kept_for_the_next_process():
    pytest.importorskip("ffcv.reader", exc_type=ImportError)
    code = """
from pipelines.backends.ffcv import import_typed_dictionary
import numba
plain = numba.njit
import_typed_dictionary()
from numba.typed.typeddict import _make_dict
print(_make_dict.stats.cache_path is not None, numba.njit is plain)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
