"""DALI's shards: the same rows, as their index and as DALI itself read them."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.folder.dali import shuffled, write_dali
from tests.data_prep.archives import pixels

COUNT, SIDE, SHARD = 70, 9, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 rows of which 5 are labeled, in shards of 16."""
    out = tmp_path_factory.mktemp("rows")
    np.save(out / "train.npy", pixels(COUNT, SIDE))
    np.save(out / "train_labels.npy", np.arange(COUNT) % 7 - 1)
    np.save(out / "labeled_rows.npy", np.array([1, 5, 8, 33, 69]))
    np.save(out / "unlabeled_rows.npy", np.arange(0, COUNT, 2))
    write_dali(out, "train", SHARD)
    return out


def indexed(folder: Path, subset: str = "") -> list[tuple[Path, list[list[str]]]]:
    """(tar, fields of each line) of every index."""
    indices = []
    for path in sorted((folder / "train-dali" / subset).glob("*.idx")):
        head, *lines = path.read_text().splitlines()
        assert head == f"v1.2 {len(lines)}"
        indices.append((folder / "train-dali" / f"{path.stem}.tar", [line.split() for line in lines]))
    return indices


def test_tars_and_indices_hold_the_rows_in_the_recorded_order(folder: Path) -> None:
    images, labels = np.load(folder / "train.npy"), np.load(folder / "train_labels.npy")
    order = np.load(folder / "train-dali" / "order.npy")
    assert sorted(order.tolist()) == [*range(COUNT)]
    position = 0
    for tar, lines in indexed(folder):
        data = tar.read_bytes()
        with tarfile.open(tar) as archive:
            names = archive.getnames()
        assert names == [field for line in lines for field in (line[3], line[7])]
        for line in lines:
            row = order[position]
            position += 1
            start, size, ids = int(line[1]), int(line[2]), int(line[5])
            assert np.array_equal(np.frombuffer(data[start : start + size], np.uint8), images[row].reshape(-1))
            assert np.frombuffer(data[ids : ids + 16], "<i8").tolist() == [row, labels[row]]
    assert position == COUNT
    assert [len(lines) for _, lines in indexed(folder)] == [16, 16, 16, 16, 6]


def test_subset_indices_name_just_their_rows(folder: Path) -> None:
    for subset in ("labeled", "unlabeled"):
        rows = [int(line[3][:9]) for _, lines in indexed(folder, subset) for line in lines]
        assert sorted(rows) == np.load(folder / f"{subset}_rows.npy").tolist()


def test_written_again_it_is_the_same(folder: Path) -> None:
    files = sorted(p for p in (folder / "train-dali").rglob("*") if p.is_file())
    before = {path: path.read_bytes() for path in files}
    write_dali(folder, "train", SHARD)
    assert {path: path.read_bytes() for path in files} == before
    assert not (folder / ".train-dali.tmp").exists()


def test_the_order_is_shuffled_and_fixed_for_good() -> None:
    assert shuffled(6).tolist() == shuffled(6).tolist()
    assert sorted(shuffled(1000)) == [*range(1000)]
    assert np.abs(np.corrcoef(np.arange(1000), shuffled(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("subset", ["", "labeled", "unlabeled"])
def test_dali_reads_the_rows(folder: Path, subset: str) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def, types

    images, labels = np.load(folder / "train.npy"), np.load(folder / "train_labels.npy")
    indices = sorted((folder / "train-dali" / subset).glob("*.idx"))
    tars = [str(folder / "train-dali" / f"{path.stem}.tar") for path in indices]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> tuple:
        flat, ids = fn.readers.webdataset(
            paths=tars,
            index_paths=[str(path) for path in indices],
            ext=["bin", "ids"],
            dtypes=[types.UINT8, types.INT64],
            name="reader",
        )
        return fn.reshape(flat, shape=[SIDE, SIDE, 3], layout="HWC"), ids

    pipeline = read()
    pipeline.build()
    rows = []
    for _ in range(pipeline.epoch_size("reader")):
        flat, ids = pipeline.run()
        row, label = np.array(ids[0]).tolist()
        assert np.array_equal(np.array(flat[0]), images[row])
        assert label == labels[row]
        rows.append(row)
    order = np.load(folder / "train-dali" / "order.npy").tolist()
    wanted = set(np.load(folder / f"{subset}_rows.npy").tolist()) if subset else set(order)
    assert rows == [row for row in order if row in wanted]
