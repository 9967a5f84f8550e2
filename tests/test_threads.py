"""Rows prepared by threads: all of them, in order, ahead of their use and no further."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.threads import AHEAD, available_cores, batches_ahead, decoding_threads


@given(rows=st.lists(st.integers(0, 9)), batch=st.integers(1, 5), threads=st.integers(1, 4))
def test_batches_are_all_rows_in_their_order(rows: list[int], batch: int, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        found = list(batches_ahead(pool, lambda row: 2 * row, rows, batch))
    assert found == [[2 * row for row in rows[start : start + batch]] for start in range(0, len(rows), batch)]


def test_while_a_batch_is_used_so_many_more_are_under_way_and_no_further() -> None:
    begun: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        batches = batches_ahead(pool, begun.append, range(100), 5)
        next(batches)
        pool.submit(int).result()  # one thread: what was asked for has ended
        assert begun == list(range(5 * (1 + AHEAD)))
        batches.close()


def test_an_error_comes_with_its_batch_and_ends_the_work() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def work(row: int) -> int:
        begun.append(row)
        if row == 2:
            raise ValueError("row 2")
        if row > 2:
            go_on.wait()
        return row

    with ThreadPoolExecutor(1) as pool:
        batches = batches_ahead(pool, work, range(100), 2)
        assert next(batches) == [0, 1]
        with pytest.raises(ValueError, match="row 2"):
            next(batches)
        go_on.set()
    assert begun in ([0, 1, 2], [0, 1, 2, 3])  # the thread may have begun row 3 before the rest was given up


def test_decoding_threads_are_as_many_as_asked_for_or_as_there_are_cores() -> None:
    together = threading.Barrier(3)
    with decoding_threads("cpu", 3) as pool:
        assert all(future.result() >= 0 for future in [pool.submit(together.wait, 60) for _ in range(3)])
    assert available_cores() == len(os.sched_getaffinity(0)) >= 1


def test_the_cores_of_a_thread_are_those_that_it_may_use() -> None:
    def on_one() -> int:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return available_cores()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(on_one).result() == 1


def test_threads_that_decode_for_a_model_on_the_cpu_give_way_to_it() -> None:
    for device, step in (("cpu", 5), ("cuda", 0)):
        with decoding_threads(device, 1) as pool:
            niceness = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
        assert niceness == min(19, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + step)
