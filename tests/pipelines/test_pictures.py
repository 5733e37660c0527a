"""The script that draws the README's pictures: what it compares, and what it says of bad input."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks import pictures
from benchmarks.augment import photographs
from data_prep.errors import UserError


def test_the_strongest_level_is_the_one_that_changes_most():
    image = photographs(32, 1)[0]
    assert pictures.strongest("brightness", image)[0] == 1
    level, ours = pictures.strongest("rotate", image)
    assert level in (8, 9)
    np.testing.assert_array_equal(ours, np.asarray(Image.fromarray(image).rotate(int(30 * level / 10))))


def test_a_difference_from_pillow_is_not_drawn(monkeypatch):
    monkeypatch.setitem(pictures.PILLOW, "solarize", lambda image, level, sign: ImageOps.posterize(image, 1))
    with pytest.raises(RuntimeError, match=r"the kernel's solarize at level \d is not Pillow's"):
        pictures.strongest("solarize", photographs(16, 1)[0])


def test_images_come_from_folders_and_zips_alike(tmp_path, shared_images):
    images = shared_images(32)[: pictures.SAMPLES]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    np.testing.assert_array_equal(pictures.load_images(tmp_path, 32), images)
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"must hold 6 or more images .* has 5"):
        pictures.load_images(tmp_path, 32)
    with pytest.raises(UserError, match=r"must be a folder or a zip of images, got .*nowhere"):
        pictures.load_images(tmp_path / "nowhere", 32)
