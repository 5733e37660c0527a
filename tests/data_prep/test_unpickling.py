"""Pickles are read without executing what they say."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.sources.unpickling import load_plain
from tests.data_prep.archives import python2_pickle, python3_pickle

BATCH = {
    "batch_label": "training batch 1 of 5",
    "labels": [3, 1, 2],
    "data": np.arange(3 * 300, dtype=np.uint8).reshape(3, 300),
    "filenames": ["a.png", "b.png", "c.png"],
}


class _Runs:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
def test_both_pythons_batches_are_read(write: object) -> None:
    loaded = load_plain(write(BATCH), "here")
    assert loaded["labels"] == BATCH["labels"]
    assert loaded["filenames"] == BATCH["filenames"]
    assert loaded["data"].dtype == np.uint8
    assert np.array_equal(loaded["data"], BATCH["data"])


def test_the_python2_layout_is_the_real_one() -> None:
    loaded = pickle.loads(python2_pickle(BATCH), encoding="latin1")  # our own bytes: shows the writer is right
    assert np.array_equal(loaded["data"], BATCH["data"])
    assert loaded["labels"] == [3, 1, 2]


def test_fortran_order_and_other_number_types_are_read() -> None:
    data = {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b": np.arange(4, dtype=">i4")}
    loaded = load_plain(python3_pickle(data), "here")
    assert np.array_equal(loaded["a"], data["a"])
    assert np.array_equal(loaded["b"], data["b"])


def test_nothing_malicious_runs(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    attacks = [
        _Runs(os.system, f"touch {mark}"),
        _Runs(exec, f"open({str(mark)!r}, 'w')"),
        _Runs(eval, "1"),
        _Runs(getattr, _Runs(__import__, "os"), "system"),
        _Runs(np.load, str(mark)),
        {"data": _Runs(Path.touch, mark), "labels": []},
        {"data": np.array([_Runs(Path.touch, mark)], object)},
    ]
    for protocol in (0, 2, 5):
        for attack in attacks:
            with pytest.raises(UserError, match=r"bad.pkl (is refused|is damaged)") as caught:
                load_plain(pickle.dumps(attack, protocol=protocol), "bad.pkl")
            assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_the_refused_name_is_given() -> None:
    with pytest.raises(UserError, match=r"asks for posix\.system, which the format does not need"):
        load_plain(pickle.dumps(_Runs(os.system, "true"), protocol=2), "bad.pkl")


def test_damaged_pickles_and_other_things_are_said() -> None:
    good = python3_pickle(BATCH)
    for cut in (0, 1, 10, len(good) // 2, len(good) - 1):
        with pytest.raises(UserError, match=r"here is damaged \(.+\)\. Download it again\."):
            load_plain(good[:cut], "here")
    with pytest.raises(UserError, match="holds no dictionary but list"):
        load_plain(pickle.dumps([1, 2]), "here")


def test_an_array_of_the_wrong_size_is_refused() -> None:
    short = python2_pickle(BATCH).replace(b"M" + (300).to_bytes(2, "little"), b"M" + (301).to_bytes(2, "little"))
    with pytest.raises(UserError, match=r"an array of shape \(3, 301\) with 900 bytes"):
        load_plain(short, "here")
