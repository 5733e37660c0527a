"""Damaged, inconsistent and missing input: one clear line, before the first batch."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from pipelines import Stream, open_loaders, read_info
from tests.pipelines import folders

LABELED = {"labeled": Stream("labeled", ("weak",))}
BOTH = {**LABELED, "unlabeled": Stream("unlabeled", ("weak",))}


def open_it(folder: Path, backend: str = "resident", **options):
    settings = {"streams": BOTH, "batch": 4, "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    return open_loaders(folder, backend=backend, **(settings | options))


def refuses(message: str, *args, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_it(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def ffcv_copy(ffcv_folder, tmp_path) -> Path:
    return Path(shutil.copytree(ffcv_folder, tmp_path / "copy"))


def test_a_missing_folder(tmp_path):
    refuses(r"No data set at .*none \(manifest.json is missing\). Build it", tmp_path / "none")
    with pytest.raises(UserError, match=r"Build it: python data_prep/build.py digits --res 8$"):
        read_info(tmp_path / "none", "digits --res 8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"mu": 0}, "mu must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"rank": 2, "world": 2}, r"rank must be within 0..world - 1, got rank 2 of 2"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
        ({"dtype": torch.float16}, "dtype must be float32 or bfloat16, got torch.float16"),
        ({"backend": "resdient"}, r"Unknown back end 'resdient'. Did you mean 'resident'\?"),
        ({"streams": {}}, "streams must hold at least one stream, got none"),
        (
            {"streams": {"a": Stream("labled", ("weak",))}},
            r"Unknown part of a stream 'labled'. Did you mean 'labeled'\?",
        ),
        ({"streams": {"a": Stream("all", ("weak", "strog"))}}, r"Unknown view 'strog'. Did you mean 'strong'\?"),
        ({"streams": {"a": Stream("all", ())}}, r"The stream 'a': views must name at least one view, got \(\)"),
        (
            {"streams": {"a": Stream("unlabeled", ("strong", "weak", "strong"))}},
            r"The stream 'a': views of one name must stand together, got \('strong', 'weak', 'strong'\)",
        ),
        (
            {"streams": {"a": Stream("all", ("weak",), balanced=True)}},
            "The stream 'a': balanced needs part 'labeled', got 'all'",
        ),
        ({"streams": {"a": Stream("all", ("weak",), batch=0)}}, "The stream 'a': batch must be 1 or more, got 0"),
        ({"backend": "ffcv"}, r"has no train.beton. Build it with --format ffcv, or use the back end resident"),
    ],
)
def test_wrong_settings(folder, options, message):
    if options.get("backend") == "ffcv":
        pytest.importorskip("ffcv.reader", exc_type=ImportError)
    refuses(message, folder, **options)


@pytest.mark.parametrize("name", ["train.npy", "test.npy", "train_labels.npy", "labeled_rows.npy"])
def test_a_flipped_byte_in_an_array(copy, name):
    flip_byte(copy / name, -1)
    refuses(rf"{name} is damaged: its checksum is not the manifest's. Rebuild it: python", copy)


def test_an_unreadable_array(copy, monkeypatch):
    def refuse(path: Path, sha256: str) -> bool:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("pipelines.arrays.is_as_written", refuse)
    refuses(r"Cannot read .*train.npy \(Input/output error\)\. Mend that, or rebuild it: python .* --out .*copy", copy)


@pytest.mark.parametrize("name", ["train.npy", "train_labels.npy", "unlabeled_rows.npy"])
def test_a_missing_or_shortened_array(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-100])
    refuses(rf"{name} has [\d,]+ bytes, the manifest says", copy)
    (copy / name).unlink()
    refuses(rf"{name} is missing", copy)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train", np.zeros((50, 16, 16, 3), np.float32), r"train.npy must be uint8 .*, got float32"),
        ("train", np.zeros((50, 16, 17, 3), np.uint8), r"train.npy must be uint8 \('any', 16, 16, 3\), got uint8"),
        ("test_labels", np.zeros(10, np.int64), r"test_labels.npy must be int64 \(11,\), got int64 \(10,\)"),
        ("test_labels", np.full(11, 3), r"test_labels.npy: values must be within 0..2, got 3..3"),
        ("train_labels", np.full(50, -2), r"train_labels.npy: values must be within -1..2, got -2..-2"),
        ("train_labels", np.full(50, -1), r"a labeled row must have a label"),
        ("labeled_rows", np.array([0, 50]), r"labeled_rows.npy: values must be within 0..49, got 0..50"),
        ("unlabeled_rows", np.array([-1, 3]), r"unlabeled_rows.npy: values must be within 0..49, got -1..3"),
        ("labeled_rows", np.zeros(0, np.int64), "labeled_counts of manifest.json are not those of the label arrays"),
        ("unlabeled_rows", np.arange(49), "unlabeled_counts of manifest.json are not those of the label arrays"),
        ("test_labels", np.full(11, 1), "test_counts of manifest.json are not those of the label arrays"),
    ],
)
def test_arrays_that_do_not_fit_together(copy, name, array, message):
    np.save(copy / f"{name}.npy", array)
    folders.accept(copy, f"{name}.npy")
    refuses(message, copy)


@pytest.mark.parametrize("part", ["labeled", "unlabeled"])
def test_a_stream_without_images(copy, part):
    np.save(copy / f"{part}_rows.npy", np.zeros(0, np.int64))
    folders.refresh_manifest(copy)
    refuses(f"'tiny' has no {part} images, which the stream '{part}' reads", copy)


def test_an_unlabeled_set_may_be_empty_where_no_stream_reads_it(copy):
    np.save(copy / "unlabeled_rows.npy", np.zeros(0, np.int64))
    folders.refresh_manifest(copy)
    assert next(open_it(copy, streams=LABELED).train()).rows.keys() == {"labeled"}


def test_no_array_is_ever_unpickled(copy):
    np.save(copy / "train_labels.npy", np.array([object()] * 50), allow_pickle=True)
    folders.accept(copy, "train_labels.npy")
    refuses(r"train_labels.npy is not a readable array", copy)


def test_a_channel_without_spread(copy):
    folders.refresh_manifest(copy, std=[0.2, 0.0, 0.2])
    refuses(r"std must be above 0 in every channel", copy)


def test_damaged_betons(ffcv_copy):
    """Found out before FFCV opens them: by itself it crashes, hangs or reads garbage on some of these."""
    path = ffcv_copy / "train.beton"
    whole = path.read_bytes()
    flip_byte(path, len(whole) // 2)
    refuses(r"train.beton is damaged: its checksum is not the manifest's", ffcv_copy, "ffcv")
    for kept in (0, 10, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:kept])
        refuses(r"train.beton has [\d,]+ bytes, the manifest says", ffcv_copy, "ffcv")
    path.unlink()
    refuses(r"train.beton is missing", ffcv_copy, "ffcv")


def test_betons_that_were_never_right(ffcv_copy):
    """The same files with a manifest that calls them whole: the structure is checked as well."""
    path = ffcv_copy / "train.beton"
    whole = path.read_bytes()
    cases = {
        "its allocation table is missing": whole[:16] + b"\0" * 8 + whole[24:],  # what a killed writer leaves
        "FFCV cannot read it": b"junk" * 1000,
        "its allocation table": whole[:-24],
        "it has 11 rows instead of 50": (ffcv_copy / "test.beton").read_bytes(),
        "its images lie outside of it": move_images(whole),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        folders.accept(ffcv_copy, "train.beton")
        refuses(message, ffcv_copy, "ffcv")


def move_images(beton: bytes) -> bytes:
    """The file with every pointer of its allocation table, which comes last, moved past its end."""
    table = np.frombuffer(beton[-24 * 50 :], "<u8").reshape(50, 3) + np.array([0, len(beton), 0], "<u8")
    return beton[: -24 * 50] + table.tobytes()


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


SHARD = "train-dali/00001"


@pytest.mark.parametrize("name", [f"{SHARD}.tar", "train-dali/unlabeled/00001.idx", "train-dali/labeled/00001.idx"])
def test_damaged_shards(dali_folder, tmp_path, name):
    """Found out before DALI opens them."""
    copy = copied(dali_folder, tmp_path)
    whole = (copy / name).read_bytes()
    flip_byte(copy / name, len(whole) // 2)
    refuses(rf"{name} is damaged: its checksum is not the manifest's", copy, "dali")
    for kept in (0, 10, len(whole) - 1):
        (copy / name).write_bytes(whole[:kept])
        refuses(rf"{name} has [\d,]+ bytes, the manifest says", copy, "dali")
    (copy / name).unlink()
    refuses(rf"{name} is missing", copy, "dali")


def test_shards_that_were_never_right(dali_folder, tmp_path):
    """The same with a manifest that calls them whole: the indices are checked as well."""
    copy = copied(dali_folder, tmp_path)
    path = copy / "train-dali/unlabeled/00001.idx"
    head, first, *rest = path.read_text().splitlines()
    fields = first.split()

    def index(changes: dict[int, str]) -> str:
        line = " ".join(changes.get(i, field) for i, field in enumerate(fields))
        return "\n".join([head, line, *rest, ""])

    cases = {
        "it begins with 'v1.2 16' and has 15 entries": "\n".join([head, *rest, ""]),
        "it begins with 'junk'": "junk",
        "it begins with ''": "",
        r"an entry is not a .bin and an .ids member": index({0: "jpg"}),
        "an entry holds something else than numbers": index({1: "start"}),
        "a member has another size than 768 and 16 bytes": index({2: "769"}),
        "an entry lies outside of the tar": index({1: "900000"}),
        r"they name 50 rows, not the 50 of unlabeled_rows.npy": index({3: "000000999.bin"}),
        r"they name 51 rows": "\n".join(["v1.2 17", first, first, *rest, ""]),
    }
    for message, content in cases.items():
        path.write_text(content)
        folders.accept(copy, "train-dali/unlabeled/00001.idx")
        refuses(message, copy, "dali")


def test_a_tar_cut_short_behind_its_manifest(dali_folder, tmp_path):
    copy = copied(dali_folder, tmp_path)
    path = copy / f"{SHARD}.tar"
    path.write_bytes(path.read_bytes()[:10_000])
    folders.accept(copy, f"{SHARD}.tar")
    refuses("an entry lies outside of the tar", copy, "dali")
