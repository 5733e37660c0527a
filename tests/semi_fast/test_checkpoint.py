"""Checkpoints: complete or absent, damage recognized."""

import errno
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from semi_fast.run.checkpoint import is_full, list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    return {"model": {"w": weight, "n": torch.tensor(3)}, "optimizer": {"w": torch.randn(2, dtype=torch.bfloat16)}}


def test_round_trip_to_the_bit(tmp_path):
    saved = tensors()
    save_checkpoint(tmp_path, 7, saved, {"history": [1.5, None]})
    loaded = newest_checkpoint(tmp_path)
    assert loaded.step == 7
    assert loaded.values == {"history": [1.5, None]}
    for group, named in saved.items():
        assert loaded.tensors[group].keys() == named.keys()
        assert all(
            torch.equal(loaded.tensors[group][n], t) and loaded.tensors[group][n].dtype == t.dtype
            for n, t in named.items()
        )


def test_only_the_newest_are_kept_and_steps_sort_as_numbers(tmp_path):
    for step in (900, 1000, 11000):
        save_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001000", "step-000011000"]
    assert newest_checkpoint(tmp_path).step == 11000


def test_a_half_written_one_is_not_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(), {})
    (tmp_path / "step-000000002.tmp-99").mkdir()
    (tmp_path / "step-000000002.tmp-99" / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_an_error_that_names_the_file(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, 1, tensors(), {})
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        if name == "state.json":
            file.unlink()
            assert newest_checkpoint(tmp_path) is None
            return
        file.unlink()
    else:
        content = content[: len(content) // 2] if damage == "cut" else content
        if damage == "flip":
            content[0 if name == "state.json" else len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    with pytest.raises(UserError, match="step-000000001"):
        load_checkpoint(path)


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") is None


def test_a_damaged_newest_one_is_said_and_an_older_one_used(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(), {})
    (tmp_path / "step-000000002" / "model.safetensors").write_bytes(b"junk")
    said = []
    assert newest_checkpoint(tmp_path, say=said.append).step == 1
    assert len(said) == 1
    assert "step-000000002/model.safetensors is damaged" in said[0]
    (tmp_path / "step-000000001" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="step-000000001"):
        newest_checkpoint(tmp_path, say=said.append)


def test_a_failed_save_leaves_nothing_and_keeps_the_older_ones(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(), {}, keep=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("semi_fast.run.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space") as caught:
        save_checkpoint(tmp_path, 2, tensors(), {}, keep=1)
    assert is_full(caught.value)
    assert not is_full(OSError(errno.EACCES, "denied"))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' account of a process's memory")
def test_a_table_is_written_without_being_cloned(tmp_path):
    """One with a row for each image may be larger than all the rest of a checkpoint."""
    # In a process of its own: one that has trained here keeps what it frees (`keep_memory`), and clones into that.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        saving, cloning, table = child.submit(memory_to_save_and_to_clone, tmp_path).result()
    assert saving < table // 2
    assert cloning > table // 2, "a clone would be seen"


def memory_to_save_and_to_clone(folder):
    """Bytes that this process takes besides while it saves a table, while it clones it, and those of the table."""

    def most_held():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def taken(work):
        Path("/proc/self/clear_refs").write_text("5")  # the most held begins anew from what is held now
        before = most_held()
        work()
        return most_held() - before

    table = torch.ones(64, 2**18)  # 64 MB
    saving = taken(lambda: save_checkpoint(folder, 1, {"model": {"table": table}}, {}))
    return saving, taken(table.clone), table.nbytes
