"""Memory that is freed and needed again."""

import multiprocessing
import os
import platform
import resource
from concurrent.futures import ProcessPoolExecutor

import pytest

from data_prep.memory import keep_memory

MB = 2**20


def faults(*arguments) -> tuple[int, int]:
    """Page faults of ten rounds that take and free three pieces of 20 MB, before and after `keep_memory`."""

    def ten_rounds():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            pieces = [bytearray(20 * MB) for _ in range(3)]
            del pieces
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    without = ten_rounds()
    keep_memory(*arguments)
    ten_rounds()  # what is kept comes from here
    return without, ten_rounds()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly")
@pytest.mark.parametrize(("most", "kept"), [((), True), ((128 * MB,), True), ((MB,), False)])
def test_kept_memory_is_not_fetched_again(most, kept, monkeypatch):
    for name in os.environ:
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD"):
            monkeypatch.delenv(name)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:  # it stays so in a process
        without, after = child.submit(faults, *most).result()
    assert (after < without / 10) == kept, (without, after)
