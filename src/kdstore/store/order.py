"""In which order an epoch shows the rows: a pure function of (seed, epoch, place), so a run resumes anywhere and no order is ever stored.

Everything is drawn by a counter-based hash in whole numbers of 64 bits, never by a generator of NumPy's: the order is the same on every platform and
under every version. Up to SORTED_ROWS rows a permutation is made by sorting hashes, which reaches every order with the same probability; beyond, by a
Feistel network, which does not for a handful of rows but needs no memory for a billion.

A full shuffle reads single rows. A window shuffle is for what lies on slow disks: blocks of B neighbouring rows (whole shards, say) take a random order, and
each W rows of that are shuffled in themselves, so only the blocks of a window or two must be in memory. What it costs in randomness, N rows in all:

- every row is at every place of the epoch with the same probability 1 / N, and moves about W / 3 places from where its block came in;
- two rows are in one batch of S rows with probability (S - 1) / (W - 1) if they are of one block, and (W - B) / (N - B) times that if not, where a full
  shuffle has (S - 1) / (N - 1) for both: neighbours meet about N / W times as often, all others hardly less often as long as W is many blocks.

So neighbours in the store should be unrelated, or W many blocks and many batches. W = N is a full shuffle. (The formulas are for B, W and S that divide
W, N and W; short last blocks and windows change them by their share.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdstore.errors import ConfigError
from kdstore.store.layout import ArraySpec

Int64 = npt.NDArray[np.int64]

ORDER, CAPTION, BLOCKS, SHORT, WINDOW, VIEW, DROPOUT, DROP, TARGET = range(1, 10)
"""What a hash is drawn for; by distillation: captions, views, dropout, left-out teachers, permuted targets."""
SORTED_ROWS = 1 << 22  # a permutation of 32 MiB
ROUNDS = 12


@dataclass(frozen=True)
class Order:
    """The order of `num_rows` rows in every epoch: a full shuffle, or blocks of `block` rows shuffled in windows of `window` rows (rounded to whole blocks)."""

    num_rows: int
    seed: int
    block: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        if self.block < 1 or (self.window is not None and self.window < self.block):
            raise ConfigError(f"A window of {self.window} rows holds no block of {self.block} rows.", "Give a larger window, or smaller blocks.")

    @classmethod
    def windowed(cls, spec: ArraySpec, seed: int, window_bytes: int, block: int | None = None) -> Order:
        """Shuffle an array in windows of at most `window_bytes`, by whole shards or blocks of `block` rows; raises ConfigError if not one fits."""
        return cls(spec.shape[0], seed, block or spec.shard[0], window_bytes // (spec.row_bytes * spec.views))

    def rows(self, epoch: int, places: npt.ArrayLike) -> Int64:
        """Return the rows [B] at places [B] of an epoch, from 0 to num_rows - 1."""
        places_B = np.asarray(places, np.int64)
        if self._full:
            return permuted(places_B, self.num_rows, self.seed, epoch, ORDER)
        windows_B = self.window_of(epoch, places_B)
        shuffled_B = np.empty_like(places_B)
        for window in np.unique(windows_B).tolist():
            start, stop = self._bounds(epoch, window)
            inside = windows_B == window
            shuffled_B[inside] = start + permuted(places_B[inside] - start, stop - start, self.seed, epoch, WINDOW, window)
        return self.read_rows(epoch, shuffled_B)

    def window_of(self, epoch: int, places: npt.ArrayLike) -> Int64:
        """Return the window [B] in which each place [B] lies."""
        places_B = np.asarray(places, np.int64)
        if self._full:
            return np.zeros_like(places_B)
        _, end = self._bounds(epoch, self._short(epoch) // self._blocks_per_window)
        return (places_B + self._gap * (places_B >= end)) // (self._blocks_per_window * self.block)

    def window_start(self, epoch: int, place: int) -> int:
        """Return the first place of the window of a place; in a full shuffle, the place."""
        if self._full:
            return place
        return self._bounds(epoch, int(self.window_of(epoch, place)))[0]

    def read_rows(self, epoch: int, places: npt.ArrayLike) -> Int64:
        """Return the rows [B] at places [B], if windows were not shuffled in themselves: the order in which a disk should read them."""
        places_B = np.asarray(places, np.int64)
        if self._full:
            return self.rows(epoch, places_B)
        short = self._short(epoch)
        places_B = places_B + self._gap * (places_B >= (short + 1) * self.block - self._gap)
        blocks_B = places_B // self.block
        full_B = np.minimum(blocks_B - (blocks_B > short), self._num_blocks - 2)  # among the other blocks; of no use where it is the short one
        moved_B = permuted(full_B, self._num_blocks - 1, self.seed, epoch, BLOCKS)
        return np.where(blocks_B == short, self._num_blocks - 1, moved_B) * self.block + places_B % self.block

    @property
    def _full(self) -> bool:
        return self.window is None or self.window >= self.num_rows

    @property
    def _num_blocks(self) -> int:
        return -(-self.num_rows // self.block)

    @property
    def _blocks_per_window(self) -> int:
        assert self.window is not None
        return self.window // self.block

    @property
    def _gap(self) -> int:
        """Rows that the last block of the array lacks."""
        return self._num_blocks * self.block - self.num_rows

    def _short(self, epoch: int) -> int:
        """Return the place of the array's last block, which may be short, among the blocks of an epoch."""
        return int(draw(self.seed, epoch, SHORT)[0] % np.uint64(self._num_blocks))

    def _bounds(self, epoch: int, window: int) -> tuple[int, int]:
        """Return the first place of a window, and that after its last."""
        short = self._short(epoch)
        blocks = [min(w * self._blocks_per_window, self._num_blocks) for w in (window, window + 1)]
        start, stop = (b * self.block - self._gap * (b > short) for b in blocks)
        return start, stop


@dataclass(frozen=True)
class Batches:
    """The batches of a run as lists of rows, one per step: a batch sampler for a PyTorch DataLoader, or for `gather_ahead`.

    A step belongs to all ranks: rank r of w yields its part of the same global batch, whatever w and the number of loading processes are. The short last
    batch of every epoch is left out. Resume with `first` = the number of steps taken.
    """

    order: Order
    batch_size: int  # of all ranks together
    steps: int  # of the whole run
    first: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.order.num_rows:
            raise ConfigError(f"A batch of {self.batch_size} cannot be taken from {self.order.num_rows} rows.", "Correct batch_size.")
        if not 0 <= self.rank < self.world or self.batch_size % self.world:
            raise ConfigError(f"Rank {self.rank} of {self.world} has no equal part of a batch of {self.batch_size}.", "Choose another batch_size.")

    @property
    def steps_per_epoch(self) -> int:
        return self.order.num_rows // self.batch_size

    def __len__(self) -> int:
        return max(self.steps - self.first, 0)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows(step).tolist() for step in range(self.first, self.steps))

    def rows(self, step: int) -> Int64:
        """Return the rows [batch_size / world] of this rank in a step."""
        share = self.batch_size // self.world
        start = step % self.steps_per_epoch * self.batch_size + self.rank * share
        return self.order.rows(step // self.steps_per_epoch, np.arange(start, start + share))

    def coming(self, depth: int = 2) -> Iterator[list[int]]:
        """Yield with every batch the rows to announce to the kernel while it is read, of all ranks, since they may share a disk.

        These are, block after block, the rows one window later; in a full shuffle those `depth` batches later. The first time also those before.
        """
        order, in_epoch = self.order, self.steps_per_epoch * self.batch_size
        lead = min(order.window or depth * self.batch_size, order.num_rows)
        for step in range(self.first, self.steps):
            epoch, place = step // self.steps_per_epoch, step % self.steps_per_epoch * self.batch_size
            start = order.window_start(epoch, place) if step == self.first else place + lead
            places = np.arange(start, place + lead + self.batch_size)
            now, after = places[places < order.num_rows], places[places >= in_epoch] - in_epoch
            yield [*order.read_rows(epoch, now).tolist(), *order.read_rows(epoch + 1, after[after < order.num_rows]).tolist()]


def permuted(places_B: Int64, size: int, *key: int) -> Int64:
    """Return what lies at places [B] of a random permutation of `range(size)`, another one for each key."""
    return permutation(size, *key)[places_B] if size <= SORTED_ROWS else feistel(places_B, size, *key)


@functools.lru_cache(maxsize=4)  # the blocks of an epoch and the windows that a batch touches
def permutation(size: int, *key: int) -> Int64:
    """Return a random permutation of `range(size)` as an array."""
    return np.argsort(draw(*key, np.arange(size)), kind="stable")


def feistel(places_B: Int64, size: int, *key: int) -> Int64:
    """Do what `permuted` does, in memory for [B] alone.

    A Feistel network on pairs of numbers below sqrt(size), and again for the few that come out at or above size (Black and Rogaway 2002).
    """
    width = math.isqrt(max(size - 1, 0)) + 1
    height = max(-(-size // width), 1)
    keys = draw(*key, np.arange(ROUNDS))
    out_B = places_B.astype(np.uint64)
    walking = np.arange(len(out_B))
    while len(walking):
        high, low = np.divmod(out_B[walking], np.uint64(width))
        for even, odd in keys.reshape(-1, 2):
            low = (low + _mix(even ^ high) % np.uint64(width)) % np.uint64(width)
            high = (high + _mix(odd ^ low) % np.uint64(height)) % np.uint64(height)
        out_B[walking] = high * np.uint64(width) + low
        walking = walking[out_B[walking] >= size]
    return out_B.astype(np.int64)


def draw(*parts: int | Int64) -> npt.NDArray[np.uint64]:
    """Return uniform 64-bit numbers, one for each element of the parts: SplitMix64's finaliser (Steele et al. 2014) applied to each part in turn."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mix(state ^ np.atleast_1d(part).astype(np.uint64))
    return state


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
