"""A few photographs of five of ILSVRC2012's classes, in every form in which people have ImageNet."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from data_prep.sources.imagenet127 import read_table
from tests.data_prep.archives import encoded, pixels, write_tar

TABLE = read_table()
# Two classes of one superclass, and three of others: soft-finned fish, shark, ray, bird.
WNIDS = ("n01440764", "n01443537", "n01484850", "n01496331", "n01514668")
COUNTS = (7, 6, 11, 3, 1)
SUPERS = ["soft-finned fish", "shark", "ray", "bird"]
SUPER_COUNTS = [13, 11, 3, 1]
SIDES = [(30, 20), (64, 64), (9, 50)]


def photos() -> dict[str, dict[str, bytes]]:
    """{"train" | "val": {name: JPEG}}: names as in ILSVRC2012; val has two images of each class, in mixed order."""
    rng = np.random.default_rng(0)

    def photo() -> bytes:
        height, width = SIDES[rng.integers(3)]
        return encoded(rng.integers(0, 256, (height, width, 3), np.uint8), "JPEG")

    train = {f"{w}/{w}_{10 * i + 3}.JPEG": photo() for w, n in zip(WNIDS, COUNTS, strict=True) for i in range(n)}
    val = {f"{WNIDS[i % 5]}/ILSVRC2012_val_{i + 1:08d}.JPEG": photo() for i in range(10)}
    return {"train": train, "val": val}


PHOTOS = photos()


def flat(name: str) -> str:
    return name.partition("/")[2]


def as_folders(root: Path) -> Path:
    for split, files in PHOTOS.items():
        for name, data in files.items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(data)
    return root


def as_kaggle(root: Path) -> Path:
    """The layout of the Kaggle download: deeper, with a flat val and a CSV of solutions."""
    as_folders(root / "all")
    base = root / "ILSVRC" / "Data" / "CLS-LOC"
    base.mkdir(parents=True)
    (root / "all" / "train").rename(base / "train")
    (base / "val").mkdir()
    for name, data in PHOTOS["val"].items():
        (base / "val" / flat(name)).write_bytes(data)
    shutil.rmtree(root / "all")
    (root / "ILSVRC" / "Annotations" / "CLS-LOC" / "train").mkdir(parents=True)
    (root / "ILSVRC" / "Annotations" / "CLS-LOC" / "train" / "x.xml").write_text("<x/>")
    rows = [f"{Path(flat(name)).stem},{name.partition('/')[0]} 85 1 499 272" for name in PHOTOS["val"]]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    return root


def devkit() -> dict[str, bytes]:
    """The development kit's two files: class numbers of its own, in another order than that of the wnids."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    order = {wnid: number for number, wnid in enumerate(WNIDS[::-1], 1)}
    synsets = np.array([(number, wnid, "words", 0) for wnid, number in order.items()], kind)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets.reshape(-1, 1)})
    truth = "\n".join(str(order[WNIDS[i % 5]]) for i in range(10)) + "\n"
    base = "ILSVRC2012_devkit_t12/data/"
    return {base + "meta.mat": buffer.getvalue(), base + "ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def as_tars(root: Path) -> Path:
    inner = {}
    for wnid in WNIDS:
        members = {flat(name): data for name, data in PHOTOS["train"].items() if name.startswith(wnid)}
        inner[f"{wnid}.tar"] = write_tar(root / "x.tar", members, "w").read_bytes()
    (root / "x.tar").unlink()
    write_tar(root / "ILSVRC2012_img_train.tar", inner, "w")
    write_tar(root / "ILSVRC2012_img_val.tar", {flat(name): data for name, data in PHOTOS["val"].items()}, "w")
    write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", devkit())
    return root


def as_unpacked_devkit(root: Path) -> Path:
    as_folders(root)
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    for name, data in PHOTOS["val"].items():
        (root / "val" / flat(name)).write_bytes(data)
    for name, data in devkit().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def as_zip(root: Path) -> Path:
    as_folders(root / "imagenet")
    return Path(shutil.make_archive(str(root / "part"), "zip", root, "imagenet"))


def as_kaggle_zip(root: Path) -> Path:
    """The Kaggle download as it comes: the CSV of solutions is inside."""
    as_kaggle(root / "kaggle")
    return Path(shutil.make_archive(str(root / "imagenet-object-localization-challenge"), "zip", root / "kaggle"))


def as_zip_beside_devkit(root: Path) -> Path:
    as_unpacked_devkit(root / "imagenet")
    (root / "imagenet" / "ILSVRC2012_devkit_t12").rename(root / "ILSVRC2012_devkit_t12")
    return Path(shutil.make_archive(str(root / "part"), "zip", root / "imagenet"))


def as_zip_with_devkit(root: Path) -> Path:
    as_unpacked_devkit(root / "imagenet")
    return Path(shutil.make_archive(str(root / "part"), "zip", root / "imagenet"))


FORMS: dict[str, Callable[[Path], Path]] = {
    "folders": as_folders,
    "kaggle": as_kaggle,
    "tars": as_tars,
    "flat val with devkit": as_unpacked_devkit,
    "zip": as_zip,
    "kaggle's zip": as_kaggle_zip,
    "zip beside the devkit": as_zip_beside_devkit,
    "zip with the devkit": as_zip_with_devkit,
}


def box(data: bytes, side: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX))


def npz_batches(root: Path, side: int = 8, save: Callable[..., None] = np.savez) -> tuple[np.ndarray, np.ndarray]:
    """Two training batches and a validation batch. Returns all training images and classes 0..999."""
    images, labels = pixels(40, side), np.array([449, 450, 442, 1, 2] * 8)
    flat_images = images.transpose(0, 3, 1, 2).reshape(40, -1)
    for name, rows in (
        ("train_data_batch_10", slice(20, 40)),
        ("train_data_batch_2", slice(0, 20)),
        ("val_data", slice(0, 10)),
    ):
        save(root / f"{name}.npz", data=flat_images[rows], labels=labels[rows], mean=np.zeros(3))
    wnids = {449: "n01440764", 450: "n01443537", 442: "n01484850", 1: "n02119789", 2: "n02100735"}
    return images, np.array([TABLE.wnids[wnids[k]] for k in labels])
