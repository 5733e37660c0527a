"""DALI's operators against Pillow and the fused kernel, and its streams from one process to the next."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from benchmarks import pillow_views
from data_prep.errors import UserError
from pipelines import VIEWS, Stream, View, open_loaders
from pipelines.augment.plan import CUT, Planner
from pipelines.augment.randaugment import OPERATIONS
from pipelines.backends.dali_graph import Rows, build_pipeline
from tests.pipelines.test_backends import CPU, open_tiny, same, standard, take
from tests.pipelines.view_cases import KINDS, pixels, stored

LIGHT = {**VIEWS, "strong": View(ops=("rotate", "posterize"), n=2, cutout=0.5)}  # builds fast


def views_by_dali(images: np.ndarray, view: View, seed: int = 3) -> np.ndarray:
    """One view of each image (n, side, side, 3) uint8, as pixels."""
    ids = np.zeros((len(images), 2), np.int64)
    pipeline = build_pipeline(
        Rows(lambda run: (images, ids)), (view,), side=images.shape[1], mean=(0, 0, 0), std=(1 / 255,) * 3,
        batch=len(images), seed=seed, threads=1, device_id=None,
    )  # fmt: skip
    values = torch.from_dlpack(pipeline.run()[1].as_tensor()).numpy()
    assert (values == values.astype(np.uint8)).all()
    return values.astype(np.uint8)


def only(name: str, **changes) -> View:
    return View(**({"flip": False, "pad": 0, "ops": (name,), "n": 1, "probability": 1.0} | changes))


@pytest.mark.parametrize("side", [16, 17])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "equalize"])
def test_every_view_of_an_operation_is_one_of_pillow_s_and_all_of_them_come(name, side):
    images = np.stack([stored(kind, side, side) for kind in KINDS])
    copies = 60
    got = views_by_dali(np.repeat(images, copies, 0), only(name)).reshape(len(KINDS), copies, -1)
    for kind, image, views in zip(KINDS, images, got, strict=True):
        picture = Image.fromarray(image)
        wanted = {
            np.asarray(pillow_views.OPS[name](picture, level, sign)).tobytes()
            for level in range(1, 10)
            for sign in (1, -1)
        }
        seen = {view.tobytes() for view in views}
        assert seen <= wanted, f"{name} of {kind}"
        assert len(seen) > 0.8 * len(wanted), f"{name} of {kind} drew {len(seen)} of {len(wanted)} results"


@pytest.mark.parametrize("side", [32, 64])
def test_equalize_stays_near_pillow_s(side, shared_images):
    images = shared_images(side)
    ours = views_by_dali(images, only("equalize")).astype(float)
    pillow = np.stack([np.asarray(pillow_views.OPS["equalize"](Image.fromarray(i), 1, 1)) for i in images]).astype(
        float
    )
    assert np.abs(ours - pillow).mean() < 4  # of 255
    assert np.abs(ours.mean((1, 2)) - pillow.mean((1, 2))).mean() < 4
    assert histogram_distance(ours, pillow) < 0.015


@pytest.mark.parametrize("border", ["reflect", "black"])
@pytest.mark.parametrize("flip", [True, False])
def test_flip_and_crop_give_exactly_the_results_that_can_be(border, flip):
    image, view = stored("noise", 16, 16), View(border=border, flip=flip)
    planner = Planner([view], 16, 16)
    plans = np.unique(planner.sample(view, 4000, torch.Generator().manual_seed(0)), axis=0)
    wanted = {result.tobytes() for result in pixels(image[None], [0] * len(plans), plans, planner.table.numpy())}
    assert len(wanted) == (50 if flip else 25)
    views = views_by_dali(np.repeat(image[None], 2000, 0), view)
    results, counts = np.unique(views.reshape(2000, -1), axis=0, return_counts=True)
    assert {result.tobytes() for result in results} == wanted
    assert counts.max() < 2.5 * 2000 / len(wanted)


def test_cutouts_are_distributed_as_the_plans():
    side, count = 16, 4000
    view = View(flip=False, pad=0, cutout=0.5, gray=9)
    planned = Planner([view], side, side).sample(view, count, torch.Generator().manual_seed(0))[:, CUT : CUT + 4]
    cut = (views_by_dali(np.full((count, side, side, 3), 200, np.uint8), view) == 9).all(3)
    columns, rows = cut.any(1), cut.any(2)
    boxes = np.stack(
        [columns.argmax(1), rows.argmax(1), side - columns[:, ::-1].argmax(1), side - rows[:, ::-1].argmax(1)], 1
    )
    assert (cut.sum((1, 2)) == (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).all()
    for ours, theirs in zip(boxes.T, planned.T, strict=True):
        difference = np.bincount(ours, minlength=side + 1) - np.bincount(theirs, minlength=side + 1)
        assert np.abs(difference).sum() < 0.1 * count


@pytest.mark.parametrize("name", ["strong", "randaugment_3_4"])
def test_a_whole_policy_has_the_kernel_s_means_and_histograms(name, shared_images):
    images, copies, view = shared_images(32), 40, VIEWS[name]
    many = np.repeat(images, copies, 0)
    ours = views_by_dali(many, view).astype(float)
    planner = Planner([view], 32, 32)
    plan = planner.sample(view, len(many), torch.Generator().manual_seed(5))
    kernel = pixels(images, np.repeat(np.arange(len(images)), copies).tolist(), plan, planner.table.numpy()).astype(
        float
    )
    assert np.abs(ours.mean((0, 1, 2)) - kernel.mean((0, 1, 2))).max() < 3  # of 255
    assert np.abs(ours.std() - kernel.std()) < 3
    assert histogram_distance(ours, kernel) < 0.02
    by_image = np.abs(ours.reshape(len(images), -1).mean(1) - kernel.reshape(len(images), -1).mean(1))
    assert by_image.mean() < 8


def histogram_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Share of pixel values that would have to move between 16 bins to turn one histogram into the other."""
    counts = [np.histogram(values, 16, (0, 256))[0] / values.size for values in (a, b)]
    return float(np.abs(counts[0] - counts[1]).sum() / 2)


def test_an_operation_is_applied_with_its_probability():
    image, count = stored("noise", 16, 16), 2000
    views = views_by_dali(np.repeat(image[None], count, 0), only("rotate", levels=(9, 9), probability=0.3))
    changed = (views != image).any((1, 2, 3)).mean()
    assert abs(changed - 0.3) < 0.05


def open_it(folder, views=("weak", "strong"), **options):
    return open_tiny(folder, "dali", views, **{"policies": LIGHT, **options})


@pytest.mark.parametrize("form", ["dali_folder", "folder"])
@pytest.mark.parametrize("step", [1, 13, 16, 40])
def test_a_saved_state_goes_on_to_the_bit(form, step, request):
    folder = request.getfixturevalue(form)
    loaders = open_it(folder)
    batches = loaders.train()
    for _ in range(step + 1):  # loops read one batch ahead
        last = next(batches)
    state = json.loads(json.dumps(loaders.state(step)))
    expected = [last, *(next(batches) for _ in range(20))]
    again = open_it(folder).train(step, state)
    assert all(same(batch, next(again)) for batch in expected)


def test_states_are_kept_of_the_newest_steps_alone(dali_folder):
    loaders = open_it(dali_folder, ())
    take(loaders, 30)
    assert loaders.state(29) is not None
    assert loaders.state(3) is None
    assert loaders.state(30) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 5}, r"batch: now {'labeled': 5, 'unlabeled': 5}, saved {'labeled': 4, 'unlabeled': 4}"),
        ({"views": ("weak",)}, r"views: now "),
        ({"policies": VIEWS}, r"views: now "),
        ({"seed": 8}, r"seed: now 8, saved 7"),
        ({"rank": 1, "world": 2}, r"rank: now 1, saved 0; world: now 2, saved 1"),
    ],
)
def test_a_state_of_other_settings_is_refused(dali_folder, changes, message):
    loaders = open_it(dali_folder)
    take(loaders, 3)
    state = loaders.state(2)
    with pytest.raises(UserError, match=message) as caught:
        open_it(dali_folder, **changes).train(2, state)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="step: now 1, saved 2"):
        open_it(dali_folder).train(1, state)


def test_a_state_of_a_changed_graph_is_refused(dali_folder, monkeypatch):
    loaders = open_it(dali_folder)
    take(loaders, 3)
    state = loaders.state(2)
    monkeypatch.setattr("pipelines.backends.dali._SOURCES", ("dali_graph.py",))
    with pytest.raises(UserError, match="graph: now "):
        open_it(dali_folder).train(2, state)


def test_a_folder_without_shards_is_read_from_its_arrays_in_the_order_of_the_others(folder):
    dali, resident = (take(open_tiny(folder, name, ("plain",), mu=2), 12) for name in ("dali", "resident"))
    for ours, theirs in zip(dali, resident, strict=True):
        assert torch.equal(ours.rows["unlabeled"], theirs.rows["unlabeled"])
        assert torch.equal(ours.rows["labeled"], theirs.rows["labeled"])
        assert torch.equal(ours.labels["labeled"], theirs.labels["labeled"])
        views = (batch.of("unlabeled", "plain") for batch in (ours, theirs))
        torch.testing.assert_close(*views, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("streams", "got"),
    [
        ({"unlabeled": Stream("unlabeled", ("weak",))}, "none named 'labeled'"),
        ({**standard(), "more": Stream("labeled", ("weak",))}, r"the stream 'more'"),
        ({"labeled": Stream("labeled", ("weak",), balanced=True)}, r"the stream 'labeled' \(.*balanced=True"),
        ({"labeled": Stream("labeled", ("weak",), batch=4)}, r"the stream 'labeled' \(.*batch=4"),
        ({"labeled": Stream("all", ("weak",))}, r"the stream 'labeled' \(.*part='all'"),
    ],
)
def test_streams_that_dali_does_not_serve_are_refused(folder, streams, got):
    with pytest.raises(UserError, match=rf"The back end dali serves .*, got {got}.*Use the back end resident or ffcv"):
        open_tiny(folder, "dali", streams=streams)


@pytest.mark.parametrize("view", [View(pad=0, area=(0.5, 1.0)), View(jitter=(0.0, 0.0, 0.1))])
def test_views_that_dali_does_not_make_are_refused(folder, view):
    with pytest.raises(
        UserError, match=r"no resized crop and no color jitter, got the view 'strong'\. Use the back end"
    ):
        open_tiny(folder, "dali", ("strong",), policies={**VIEWS, "strong": view})


def test_other_labeled_rows_are_refused(folder):
    with pytest.raises(UserError, match=r"The back end dali serves .*, got other labeled rows than the data set's"):
        open_tiny(folder, "dali").relabel(np.array([0]), np.array([0]))


def test_shards_of_other_labels_are_noticed_when_read(dali_folder, tmp_path):
    from tests.pipelines.test_bad_folders import copied, folders

    copy = copied(dali_folder, tmp_path)
    labels = np.load(copy / "train_labels.npy")
    np.save(copy / "train_labels.npy", (labels + 1) % folders.CLASSES)
    folders.refresh_manifest(copy)
    with pytest.raises(UserError, match="DALI read rows or labels that are not the data folder's"):
        next(open_it(copy, ()).train())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_plain_views_are_the_kernel_s(dali_folder):
    options = {"batch": 4, "seed": 7, "dtype": torch.float32, "backend": "dali"}
    cpu, gpu = (
        take(open_loaders(dali_folder, standard(), device=device, **options), 40)
        for device in (CPU, torch.device("cuda"))
    )
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours.images.is_cuda
        assert torch.equal(ours.rows["unlabeled"].cpu(), theirs.rows["unlabeled"])
        views = (batch.of("unlabeled", "plain").cpu() for batch in (ours, theirs))
        torch.testing.assert_close(*views, atol=1e-5, rtol=1e-5)
