"""The order of rows: every row once per epoch, as random as documented, the same everywhere, and independent of ranks and loading processes."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch.utils.data import DataLoader, StackDataset

from kdstore.errors import ConfigError
from kdstore.store import open_store
from kdstore.store.ahead import gather_ahead
from kdstore.store.order import ORDER, Batches, Order, draw, feistel, permutation
from kdstore.store.rows import Rows

from .conftest import Sample

orders = st.builds(
    lambda rows, seed, block, blocks, rest: Order(rows, seed, block, blocks * block + rest),
    st.integers(1, 200),
    st.integers(0, 2**63 - 1),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 20),
)


def improbable(counts: np.ndarray, expected: np.ndarray | float) -> bool:
    """Whether counts differ from the expected ones as they would by chance once in 10,000 times (chi-square)."""
    return bool(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1) < 1e-4)


# Every row once


@given(orders, st.integers(0, 3))
def test_an_epoch_holds_every_row_once_and_every_window_whole_blocks(order: Order, epoch: int) -> None:
    rows = order.rows(epoch, np.arange(order.num_rows))
    assert sorted(rows.tolist()) == list(range(order.num_rows))
    windows = order.window_of(epoch, np.arange(order.num_rows))
    assert (np.diff(windows) >= 0).all()
    for window in range(windows[-1] + 1):
        places = np.flatnonzero(windows == window)
        assert sorted(rows[places].tolist()) == sorted(order.read_rows(epoch, places).tolist())
        assert (windows == window).sum() <= order.window
    if order.window < order.num_rows:
        assert all(len(set(windows[rows // order.block == block].tolist())) == 1 for block in set((rows // order.block).tolist()))


@given(orders, st.integers(0, 3), st.lists(st.integers(0, 10**6), max_size=20))
def test_a_place_has_its_row_whatever_else_is_asked_for(order: Order, epoch: int, places: list[int]) -> None:
    places = [place % order.num_rows for place in places]
    rows = order.rows(epoch, np.arange(order.num_rows))
    permutation.cache_clear()
    assert order.rows(epoch, places).tolist() == rows[places].tolist()


@given(st.integers(1, 3000), st.integers(0, 9))
def test_the_network_for_many_rows_is_a_permutation_too(size: int, key: int) -> None:
    assert sorted(feistel(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_billion_rows_need_no_permutation_in_memory() -> None:
    permutation.cache_clear()
    order = Order(10**9, 7)
    rows = np.concatenate([order.rows(0, np.arange(start, start + 1024)) for start in (0, 10**9 - 1024)])
    assert len(set(rows.tolist())) == 2048
    assert permutation.cache_info().currsize == 0
    assert not improbable(np.bincount(rows * 16 // 10**9, minlength=16), 128)


# The same everywhere


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # by SplitMix64 in whole numbers of Python
    assert draw(1, 2, 3, np.arange(2)).tolist() == [1321962074176129191, 11997311547471286909]
    assert permutation(8, 0, 0, ORDER).tolist() == Order(8, 0).rows(0, np.arange(8)).tolist() == [2, 1, 5, 6, 3, 4, 0, 7]
    assert Order(10, 0, block=3, window=6).rows(0, np.arange(10)).tolist() == [1, 9, 0, 2, 7, 6, 3, 8, 4, 5]
    assert feistel(np.arange(4), 10**9, 0, 0, ORDER).tolist() == [180526061, 351304419, 150211481, 748051166]


def test_epochs_and_seeds_have_their_own_order() -> None:
    for block, window in ((1, None), (4, 20)):
        found = {tuple(Order(100, seed, block, window).rows(epoch, np.arange(100)).tolist()) for seed in range(3) for epoch in range(3)}
        assert len(found) == 9


# As random as documented


@pytest.mark.parametrize(("block", "window"), [(1, None), (3, 6), (2, 8)])
def test_every_row_comes_to_every_place_equally_often(block: int, window: int | None) -> None:
    counts = np.zeros((12, 12))
    order = Order(12, 5, block, window)
    for epoch in range(2400):
        counts[np.arange(12), order.rows(epoch, np.arange(12))] += 1
    assert not improbable(counts, 200)


def test_all_orders_of_a_few_rows_are_equally_frequent() -> None:
    for window in (None, 4):  # as large as all rows: a full shuffle
        found = Counter(tuple(Order(4, 1, 2, window).rows(epoch, np.arange(4)).tolist()) for epoch in range(4800))
        assert not improbable(np.array([found[order] for order in itertools.permutations(range(4))]), 200)


def test_the_network_spreads_places_and_neighbours_evenly() -> None:
    size, keys = 61, 3000
    rows = np.stack([feistel(np.arange(size), size, key) for key in range(keys)])
    counts = np.zeros((size, size))
    np.add.at(counts, (np.tile(np.arange(size), keys), rows.ravel()), 1)
    assert not improbable(counts, keys / size)
    steps = (rows[:, 1:] - rows[:, :-1]) % size  # of neighbouring places: uniform over 1 to size - 1
    assert not improbable(np.bincount(steps.ravel(), minlength=size)[1:], steps.size / (size - 1))


def test_pairs_meet_as_often_as_the_formula_says() -> None:
    num_rows, block, window, batch, epochs = 96, 4, 24, 6, 800
    order = Order(num_rows, 3, block, window)
    met = np.zeros((num_rows, num_rows))
    for epoch in range(epochs):
        for rows in order.rows(epoch, np.arange(num_rows)).reshape(-1, batch):
            met[np.ix_(rows, rows)] += 1
    same_block = np.equal.outer(np.arange(num_rows) // block, np.arange(num_rows) // block)
    in_window = (batch - 1) / (window - 1)
    assert met[same_block & ~np.eye(num_rows, dtype=bool)].mean() / epochs == pytest.approx(in_window, rel=0.03)
    assert met[~same_block].mean() / epochs == pytest.approx(in_window * (window - block) / (num_rows - block), rel=0.03)


def test_rows_move_by_a_third_of_the_window_from_where_their_block_came_in() -> None:
    order, moved = Order(960, 3, 8, 240), []
    for epoch in range(40):
        came = order.read_rows(epoch, np.arange(960))
        moved.append(np.abs(np.argsort(came) - np.argsort(order.rows(epoch, np.arange(960)))).mean())
    assert np.mean(moved) == pytest.approx((240 - 1 / 240) / 3, rel=0.02)


def test_a_window_that_holds_no_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no block of 16 rows"):
        Order(100, 0, block=16, window=15)


def test_a_window_is_given_in_bytes_of_an_array(pristine: Path) -> None:
    spec = open_store(pristine).arrays["image/embedding"]  # 2 views of 6 float16, shards of 16 rows
    assert Order.windowed(spec, 3, 1000) == Order(45, 3, 16, 41)
    assert Order.windowed(spec, 3, 100, block=4) == Order(45, 3, 4, 4)
    with pytest.raises(ConfigError, match="holds no block"):
        Order.windowed(spec, 3, 100)


# Ranks, loading processes, and resuming


@given(st.integers(1, 5).flatmap(lambda parts: st.tuples(st.just(4 * parts), st.integers(4 * parts, 90))), st.booleans(), st.data())
def test_global_batches_do_not_depend_on_the_number_of_ranks_and_resume_at_any_step(size: tuple[int, int], windowed: bool, data: st.DataObject) -> None:
    batch, rows = size
    order = Order(rows, 1, 3, 12 if windowed else None)
    whole = [set(part) for part in Batches(order, batch, steps=7)]
    first = data.draw(st.integers(0, 7))
    for world in (1, 2, 4):
        ranks = [list(Batches(order, batch, steps=7, first=first, rank=rank, world=world)) for rank in range(world)]
        assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == list(Batches(order, batch, steps=7))[first:]
    per_epoch = rows // batch
    assert all(not a & b for a, b in itertools.combinations(whole[:per_epoch], 2))


@given(orders, st.integers(1, 9), st.integers(0, 30))
def test_what_is_announced_covers_what_is_read_and_comes_no_later(order: Order, batch: int, first: int) -> None:
    batches = Batches(order, min(batch, order.num_rows), steps=first + 40, first=first)
    announced: Counter[int] = Counter()
    for rows, coming in zip(batches, batches.coming(2), strict=True):
        announced.update(coming)
        assert all(announced[row] > 0 for row in rows)


def test_a_batch_that_the_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="no equal part"):
        Batches(Order(90, 0), 10, steps=1, world=4)
    with pytest.raises(ConfigError, match="cannot be taken from 9 rows"):
        Batches(Order(9, 0), 10, steps=1)


@pytest.mark.parametrize(
    ("workers", "start", "ranks"),
    [
        (0, None, [(0, 1), (0, 2), (1, 2), (3, 4)]),
        (2, "fork", [(0, 1), (0, 2), (1, 2), (3, 4)]),
        (2, "spawn", [(1, 2)]),  # each process imports torch again
    ],
)
def test_a_loader_gives_the_same_batches_whatever_its_processes_and_ranks_and_where_it_resumes(
    pristine: Path, sample: Sample, workers: int, start: str | None, ranks: list[tuple[int, int]]
) -> None:
    order, name = Order(45, 9, 4, 16), "image/embedding"
    whole = np.stack([sample.arrays[name][rows, 0] for rows in Batches(order, 8, steps=11)])
    rows = Rows(open_store(pristine), name)
    for (rank, world), first in itertools.product(ranks, [7] if start == "spawn" else [0, 7]):
        batches = Batches(order, 8, steps=11, first=first, rank=rank, world=world)
        loader = DataLoader(rows, batch_sampler=batches, num_workers=workers, multiprocessing_context=start)
        np.testing.assert_array_equal(np.stack(list(loader)), np.split(whole[first:], world, axis=1)[rank])


def test_reading_ahead_gives_the_same_batches_as_a_loader(pristine: Path, sample: Sample) -> None:
    batches = Batches(Order(45, 9), 8, steps=11)
    ahead = gather_ahead(open_store(pristine), ({"image/tokens": rows} for rows in batches))
    for rows, arrays in zip(batches, ahead, strict=True):
        np.testing.assert_array_equal(arrays["image/tokens"], sample.arrays["image/tokens"][rows, 0])


@pytest.mark.parametrize("window", [None, 16])
def test_announced_rows_change_nothing(pristine: Path, sample: Sample, window: int | None) -> None:
    batches, store = Batches(Order(45, 9, 4, window), 8, steps=11), open_store(pristine)
    for name in ("image/embedding", "text/embedding", "image/tokens"):
        ahead = gather_ahead(store, ({name: rows} for rows in batches), coming=({name: rows} for rows in batches.coming()))
        for rows, arrays in zip(batches, ahead, strict=True):
            np.testing.assert_array_equal(arrays[name], store.gather(name, rows))


def test_rows_are_a_dataset_of_single_rows_too(pristine: Path, sample: Sample) -> None:
    rows = Rows(open_store(pristine), "image/embedding", view=1)
    assert len(rows) == 45
    np.testing.assert_array_equal(np.stack(list(rows)), sample.arrays["image/embedding"][:, 1])
    pair = StackDataset(image=rows, tokens=Rows(open_store(pristine), "image/tokens"))
    (batch,) = DataLoader(pair, batch_sampler=[[3, 3, -1]])
    np.testing.assert_array_equal(batch["image"], sample.arrays["image/embedding"][[3, 3, -1], 1])
    assert batch["tokens"].shape == (3, 3, 5)
