"""The store as a state machine: whatever is written, discarded, killed and resumed, in any order, it equals a dict of arrays."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kdstore.data.source import Caption
from kdstore.errors import IncompleteStore, StoreNotFound
from kdstore.store import Plan, StoreWriter, Unit, embedding_array, open_store, token_array, verify_store

ROWS = [(str(i), (Caption("c"),) * (i % 2)) for i in range(20)]
PLAN = Plan.freeze(ROWS, unit_rows=8)  # three units of images, two of texts
SPECS = [embedding_array(PLAN, "image", 3, views=2), token_array(PLAN, "image", 2, 3, dtype="float32"), embedding_array(PLAN, "text", 5, zstd=True)]
ARRAYS = {spec.name: np.random.default_rng(0).standard_normal(spec.shape).astype(spec.dtype) for spec in SPECS}
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def open_writer(path: Path) -> StoreWriter:
    return StoreWriter.open(path, plan=PLAN, arrays=SPECS, identity={})


def write_unit(writer: StoreWriter, unit: Unit, step: int, rows: int | None = None) -> None:
    """Write a unit in blocks of `step` rows; raises ConnectionError after `rows` of them, if given."""
    with writer.attempt(unit) as attempt:
        for start in range(unit.start, unit.stop, step):
            stop = min(start + step, unit.stop)
            if rows is not None and stop - unit.start > rows:
                raise ConnectionError("the teacher is gone")
            for spec in SPECS:
                if spec.side == unit.side:
                    attempt.append(spec.name, ARRAYS[spec.name][start:stop])
            if unit.side == "image":
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * (stop - start))


def write_all(path: Path, units: int = 99) -> str | None:
    """Open, write at most so many of the pending units, and finalise if none is left."""
    with open_writer(path) as writer:
        for unit in writer.pending()[:units]:
            write_unit(writer, unit, 3)
        return None if writer.pending() else writer.finalise({})


def killed_at_rename(path: Path, renames: int, units: int) -> None:
    """Do `write_all` in a process that is killed just before one of its renames, if it comes to that."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, [renames]

        def counted(*names: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        os.replace = counted  # type: ignore[assignment]
        status = 99
        try:
            write_all(path, units)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGKILL)


class StoreMachine(RuleBasedStateMachine):
    digest = ""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=SCRATCH))
        self.path = self.folder / "store"
        if not StoreMachine.digest:
            StoreMachine.digest = write_all(self.folder / "uninterrupted") or ""
        self.recorded: set[Unit] = set()
        self.complete = False

    def teardown(self) -> None:
        """Whatever came before, the run that is resumed to its end gives the same bytes as one that nothing interrupted."""
        try:
            assert write_all(self.path) == self.digest
            store = open_store(self.path)
            for spec in SPECS:
                rows, views = np.mgrid[: spec.shape[0], : spec.views].reshape(2, -1)
                assert store.gather(spec.name, rows, views if spec.has_views else None).tobytes() == ARRAYS[spec.name].tobytes()
            assert verify_store(self.path).ok
        finally:
            shutil.rmtree(self.folder)

    def resume(self) -> StoreWriter:
        """Open the writer, which must have lost nothing and must not have made anything up."""
        writer = open_writer(self.path)
        assert writer.complete == self.complete
        assert set(writer.pending()) == (set() if self.complete else set(PLAN.units) - self.recorded)
        return writer

    @rule(data=st.data(), units=st.integers(1, 5), step=st.integers(1, 8))
    def write(self, data: st.DataObject, units: int, step: int) -> None:
        with self.resume() as writer:
            for unit in data.draw(st.permutations(writer.pending()))[:units]:
                write_unit(writer, unit, step)
                self.recorded.add(unit)

    @rule(data=st.data())
    def fail_in_a_unit(self, data: st.DataObject) -> None:
        with self.resume() as writer:
            if pending := writer.pending():
                unit = data.draw(st.sampled_from(pending))
                with pytest.raises(ConnectionError):
                    write_unit(writer, unit, 1, data.draw(st.integers(0, len(unit) - 1)))

    @rule(renames=st.integers(0, 60), units=st.integers(0, 5))
    def crash(self, renames: int, units: int) -> None:
        killed_at_rename(self.path, renames, units)
        with open_writer(self.path) as writer:
            recorded = set(PLAN.units) - set(writer.pending())
            assert recorded >= self.recorded
            assert writer.complete or not self.complete
            self.recorded, self.complete = recorded, writer.complete

    @rule()
    def finalise(self) -> None:
        with self.resume() as writer:
            if writer.pending():
                with pytest.raises(IncompleteStore):
                    writer.finalise({})
            else:
                assert writer.finalise({"run": "any"}) == self.digest
                self.complete = True

    @precondition(lambda self: self.complete)
    @rule(data=st.data())
    def read_any_rows(self, data: st.DataObject) -> None:
        store = open_store(self.path)
        assert store.digest == self.digest
        for spec in SPECS:
            rows = data.draw(st.lists(st.integers(-spec.shape[0], spec.shape[0] - 1), max_size=9))
            views = data.draw(st.integers(-spec.views, spec.views - 1)) if spec.has_views else None
            expected = ARRAYS[spec.name][rows] if views is None else ARRAYS[spec.name][rows, views]
            assert store.gather(spec.name, np.array(rows, np.int64), views).tobytes() == expected.tobytes()

    @invariant()
    def is_whole_or_is_not_read(self) -> None:
        if self.complete:
            assert verify_store(self.path).ok
        else:
            for reader in (open_store, verify_store):
                with pytest.raises((IncompleteStore, StoreNotFound)):
                    reader(self.path)


StoreMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
test_whatever_happens_the_store_equals_a_dict_of_arrays = StoreMachine.TestCase
