"""Makes the README's pictures: docs/operations.png, docs/views.png and docs/views_photo.png.

    python -m benchmarks.pictures [--images photos.zip] [--side 64] [--out docs]

operations.png: one image, every operation at the level of 1..9 that changes it most, by the fused kernel and by Pillow;
it fails where they differ in a single pixel. views.png: the three views of a few images, as a training step makes them;
views_photo.png: those for photographs.
`--images` is a folder or zip of images, whose middle squares are used; by default the two photographs that come with
scikit-learn.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image

from benchmarks.augment import photographs
from benchmarks.pillow_views import OPS as PILLOW
from data_prep.errors import UserError
from pipelines.augment.op import augment
from pipelines.augment.plan import OPS, Planner
from pipelines.augment.randaugment import OPERATIONS, find_ops, parameter_table
from pipelines.augment.views import VIEWS

SAMPLES = 6
ENDINGS = (".jpg", ".jpeg", ".png")


def load_images(path: Path | None, side: int) -> np.ndarray:
    """SAMPLES images, evenly spaced by name: (SAMPLES, side, side, 3) uint8."""
    if path is None:
        return photographs(side, SAMPLES)
    if path.is_dir():
        files = {str(file): file.read_bytes for file in path.rglob("*") if file.suffix.lower() in ENDINGS}
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if name.lower().endswith(ENDINGS)]
        files = {name: lambda name=name: archive.read(name) for name in names}
    else:
        raise UserError(f"--images must be a folder or a zip of images, got {path}")
    names = sorted(files)
    if len(names) < SAMPLES:
        raise UserError(f"--images must hold {SAMPLES} or more images ({', '.join(ENDINGS)}), {path} has {len(names)}")
    chosen = [files[names[i * len(names) // SAMPLES]]() for i in range(SAMPLES)]
    return np.stack([_middle(Image.open(io.BytesIO(data)).convert("RGB"), side) for data in chosen])


def _middle(image: Image.Image, side: int) -> np.ndarray:
    size = min(image.size)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, (x, y, x + size, y + size)))


def make(images: np.ndarray, rows: list[int], plan: np.ndarray, table: torch.Tensor) -> np.ndarray:
    """The kernel's views as pixels (V, H, W, 3) uint8: with mean 0 and std 1 / 255 nothing is normalized."""
    mean, std = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1 / 255, dtype=torch.float64)
    tensors = (torch.from_numpy(images), torch.tensor(rows), torch.from_numpy(plan), table, mean, std)
    return augment(*tensors, torch.float32, 1).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def strongest(name: str, image: np.ndarray) -> tuple[int, np.ndarray]:
    """The level of 1..9 at which the operation changes the image most, and what the kernel makes of it there.

    Raises: RuntimeError where that is not what Pillow makes of it.
    """
    table = torch.from_numpy(parameter_table(find_ops([name]), (1, 9), *image.shape[:2]))
    plan = np.zeros((9, OPS + 1), np.int32)
    plan[:, OPS] = 2 * np.arange(9)  # sign +
    ours = make(image[None], [0] * 9, plan, table)
    level = int(np.abs(ours.astype(int) - image).mean((1, 2, 3)).argmax())
    if not np.array_equal(ours[level], np.asarray(PILLOW[name](Image.fromarray(image), level + 1, 1))):
        raise RuntimeError(f"the kernel's {name} at level {level + 1} is not Pillow's")
    return level + 1, ours[level]


def draw_operations(image: np.ndarray, path: Path) -> None:
    """Every operation: the kernel's result left, Pillow's right."""
    from matplotlib import pyplot as plt

    columns = 4
    lines = -(-len(OPERATIONS) // columns)
    figure, axes = plt.subplots(lines, 2 * columns, figsize=(2 * columns * 1.15, lines * 1.4), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, name in enumerate(OPERATIONS):
        level, ours = strongest(name, image)
        pair = axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
        pair[0].imshow(ours)
        pair[1].imshow(np.asarray(PILLOW[name](Image.fromarray(image), level, 1)))
        pair[0].set_title(f"{name} {level}", fontsize=8, loc="left")
        pair[1].set_title("Pillow", fontsize=8, loc="left", color="gray")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_views(images: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    """A row of stored images, and below each its views of these names."""
    from matplotlib import pyplot as plt

    views = [VIEWS[name] for name in names]
    planner = Planner(views, *images.shape[1:3])
    plan = planner.sample_all(views, len(images), torch.Generator().manual_seed(1))
    pixels = make(images, list(range(len(images))) * len(views), plan, planner.table)
    lines = [images, *pixels.reshape(len(views), *images.shape)]
    figure, axes = plt.subplots(
        len(lines), len(images), figsize=(len(images) * 1.3, len(lines) * 1.35), layout="constrained"
    )
    for row, (title, line) in enumerate(zip(("stored", *names), lines, strict=True)):
        for axis, picture in zip(axes[row], line, strict=True):
            axis.imshow(picture)
            axis.axis("off")
        axes[row, 0].set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder or zip of images (default: scikit-learn's photographs)")
    parser.add_argument("--side", type=int, default=64, help="height and width in pixels (default 64)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to (default docs)")
    options = parser.parse_args()
    mpl.use("agg")
    try:
        images = load_images(options.images, options.side)
        options.out.mkdir(parents=True, exist_ok=True)
        draw_operations(images[2], options.out / "operations.png")
        draw_views(images, ("weak", "strong", "strong"), options.out / "views.png")
        draw_views(images, ("weak_photo", "strong_photo", "strong_photo"), options.out / "views_photo.png")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote operations.png, views.png and views_photo.png to {options.out}")


if __name__ == "__main__":
    main()
