"""Reading ahead: the same batches as without, in bounded memory, errors in their turn, and an end that leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import DamagedStore, MissingFeature, SourceError
from kdstore.store import open_store
from kdstore.store.ahead import gather_ahead, read_ahead
from kdstore.store.order import Batches, Order

from .conftest import Sample


def reading() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ahead")]


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 8))
def test_reading_ahead_keeps_the_order_of_the_items(items: int, threads: int, depth: int) -> None:
    assert list(read_ahead(lambda item: item, range(5, 5 + items), threads, depth)) == list(range(5, 5 + items))


def test_reading_ahead_is_bounded_and_ends_with_its_threads() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step

    batches = read_ahead(make, range(1000), 2)
    assert next(batches) == 0
    batches.close()
    assert len(made) <= 6
    assert not reading()


def test_a_generator_that_a_program_leaves_open_ends_with_it_in_silence(tmp_path: Path) -> None:
    ahead = "from kdstore.store.ahead import read_ahead\nahead = read_ahead(str, range(100), 2)\nprint(next(ahead))"
    (tmp_path / "program.py").write_text(f"from torch.utils.data import DataLoader\n{ahead}")  # with torch, modules are gone before the generator
    done = subprocess.run([sys.executable, "-W", "ignore", tmp_path / "program.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_an_error_comes_at_its_item_and_ends_the_threads() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise SourceError("bad row")
        return step

    batches = read_ahead(make, range(9), 2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SourceError):
        next(batches)
    assert not reading()


@given(
    requests=st.lists(st.tuples(st.lists(st.integers(-45, 44), max_size=9), st.lists(st.integers(-66, 65), max_size=9)), max_size=12),
    threads=st.integers(1, 3),
    depth=st.integers(1, 5),
)
def test_every_request_gives_what_a_gather_gives(pristine: Path, requests: list[tuple[list[int], list[int]]], threads: int, depth: int) -> None:
    store = open_store(pristine)
    asked = [{"image/tokens": images, "text/embedding": texts} for images, texts in requests]
    found = gather_ahead(store, asked, threads=threads, depth=depth)
    for request, arrays in zip(asked, found, strict=True):
        for name, rows in request.items():
            np.testing.assert_array_equal(arrays[name], store.gather(name, rows))


def test_buffers_take_turns_and_are_the_callers_kind_of_memory(pristine: Path) -> None:
    made: list[np.ndarray] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(np.empty(shape, dtype))
        return made[-1]

    rows = Batches(Order(45, 0), 9, steps=50)
    batches = gather_ahead(open_store(pristine), ({"image/embedding": part} for part in rows), depth=3, allocate=allocate)
    assert sum(any(batch["image/embedding"].base is buffer for buffer in made) for batch in batches) == 50
    assert len(made) == 4


def test_a_damaged_row_is_an_error_at_the_batch_that_holds_it(copied: Path, sample: Sample) -> None:
    shard = copied / "image/tokens/c/1/0/0/0"  # rows 4 to 7
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    batches = gather_ahead(open_store(copied), ({"image/tokens": [row]} for row in range(9)), depth=8)
    for row in range(4):
        np.testing.assert_array_equal(next(batches)["image/tokens"], sample.arrays["image/tokens"][[row], 0])
    with pytest.raises(DamagedStore, match="row 4 does not match"):
        next(batches)
    assert not reading()


def test_an_array_that_is_not_there_is_named(pristine: Path) -> None:
    with pytest.raises(MissingFeature, match="text/tokens"):
        next(gather_ahead(open_store(pristine), [{"text/tokens": [0]}]))


def test_no_batches_ahead_is_refused(pristine: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        gather_ahead(open_store(pristine), [], depth=0)


def test_ctrl_c_while_waiting_ends_the_threads(pristine: Path) -> None:
    def interrupting() -> Iterator[dict[str, list[int]]]:
        for step in range(100):
            if step == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield {"image/embedding": [step % 45]}

    with pytest.raises(KeyboardInterrupt):
        for _ in gather_ahead(open_store(pristine), interrupting()):
            pass
    assert not reading()
