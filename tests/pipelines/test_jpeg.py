"""FFCV's files of JPEGs: what JPEG leaves of the training images, in one order whatever number of threads decodes."""

import io
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from pipelines.arrays import open_arrays
from pipelines.backends.ffcv import Jpegs, Places, check_beton
from tests.pipelines.test_backends import open_tiny, same, stored_pixels, take


@pytest.fixture(scope="module")
def decoded(jpeg_folder):
    """What Pillow makes of the JPEGs in the file, row by row."""
    from ffcv.reader import Reader

    reader, data = Reader(str(jpeg_folder / "train.beton")), (jpeg_folder / "train.beton").read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    images = reader.metadata[reader.metadata.dtype.names[0]]
    pointers = images[next(name for name in images.dtype.names if "ptr" in name)].tolist()
    files = [data[pointer : pointer + sizes[pointer]] for pointer in pointers]
    assert all(file.startswith(b"\xff\xd8") for file in files)
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def test_training_reads_what_jpeg_leaves_and_testing_the_pixels_themselves(jpeg_folder, decoded):
    arrays = open_arrays(jpeg_folder)
    loaders = open_tiny(jpeg_folder, "ffcv", labeled=("plain",))
    assert loaders.backend == "ffcv"
    for batch in take(loaders, 13):
        for stream in ("labeled", "unlabeled"):
            seen, rows = stored_pixels(loaders, batch.of(stream, "plain")).astype(int), batch.rows[stream].numpy()
            assert np.abs(seen - decoded[rows]).mean() < 2  # FFCV's inverse transform is a faster one than Pillow's
            assert np.abs(seen - arrays.train[rows]).mean() > 5  # noise, of which JPEG leaves less
    tested = np.concatenate([stored_pixels(loaders, x) for x, _ in loaders.test(4)])
    np.testing.assert_array_equal(tested, arrays.test)


def test_the_number_of_threads_changes_nothing(jpeg_folder, threads_before):
    views = ("weak", "strong", "strong")
    whole = take(open_tiny(jpeg_folder, "ffcv", views, threads=1), 20)
    for threads in (2, 3):
        loaders = open_tiny(jpeg_folder, "ffcv", views, threads=threads)
        assert all(same(a, b) for a, b in zip(whole, take(loaders, 20), strict=True))
        assert all(same(a, b) for a, b in zip(whole[13:], take(loaders, 7, start=13), strict=True))
        plain = list(loaders.plain(np.arange(50), 9))
        assert [len(x) for x in plain] == [9, 9, 9, 9, 9, 5]
        loaders.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > threads_before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= threads_before


def test_a_file_is_kept_as_the_manifest_says(jpeg_folder, ffcv_folder):
    jpeg, raw = open_arrays(jpeg_folder), open_arrays(ffcv_folder)
    with pytest.raises(UserError, match="its images are not all raw 24 x 24"):
        check_beton(jpeg_folder / "train.beton", jpeg.train)
    with pytest.raises(UserError, match="its images are not all jpeg90 16 x 16"):
        check_beton(ffcv_folder / "train.beton", raw.train, "jpeg90")


def test_a_jpeg_that_cannot_be_decoded_is_an_error(tmp_path):
    """Its checksum tells damage before; this is what is left, and memory gone bad."""
    whole = io.BytesIO()
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(whole, "JPEG")
    for length, fails in ((len(whole.getvalue()), False), (20, True)):
        (tmp_path / "jpegs").write_bytes(whole.getvalue())
        stored = Jpegs(tmp_path / "jpegs", Places(np.array([0]), np.array([length])), (24, 24, 3), 1)
        with pytest.raises(UserError, match="a JPEG cannot be decoded") if fails else nullcontext():
            list(stored.read([np.array([0])], 1))


def test_a_size_of_64_bits_does_not_hide_an_image_outside_of_the_file(jpeg_folder, tmp_path):
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE

    whole, path = jpeg_folder / "train.beton", tmp_path / "train.beton"
    data, begin = bytearray(whole.read_bytes()), int(Reader(str(whole)).header["alloc_table_ptr"])
    np.frombuffer(data, ALLOC_TABLE_TYPE, offset=begin)["size"][0] = 2**64 - 10
    path.write_bytes(data)
    with pytest.raises(UserError, match="its images lie outside of it"):
        check_beton(path, open_arrays(jpeg_folder).train, "jpeg90")


def test_jpegs_are_read_where_asked_for_alone(jpeg_folder, monkeypatch):
    """So that a run goes on with the same pixels on a machine of another size."""
    monkeypatch.setattr("pipelines.room_for_images", lambda device: 5_000)
    loaders = open_tiny(jpeg_folder, "auto")
    assert loaders.backend == "resident"
    assert "train.beton keeps JPEGs, for data.backend=ffcv" in loaders.reason
    asked = open_tiny(jpeg_folder, "ffcv")
    assert asked.reason == "as set; training images are what JPEG of quality 90 leaves"
