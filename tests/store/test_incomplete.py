"""What another terminal sees of a store that is being written."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdstore.cli import main
from kdstore.store import store_progress

InChild = Callable[[Callable[[], None]], int]


def test_an_incomplete_store_tells_how_far_it_is_and_that_its_writer_lives(sample: Any, tmp_path: Path) -> None:
    path = tmp_path / "store"
    with sample.open(path) as writer:
        units = writer.pending()
        for unit in (units[0], units[2], units[-1]):  # 16 and 13 of 45 images, 16 of 60 texts
            sample.write_unit(writer, unit)
        with writer.attempt(units[1]) as attempt:
            attempt.append("image/embedding", sample.arrays["image/embedding"][16:32])
            found = store_progress(path)
            attempt.append("image/tokens", sample.arrays["image/tokens"][16:32])
            attempt.index([sample.index_row(row) for row in range(16, 32)])
        assert (found.images, found.images_recorded, found.texts, found.units, found.units_recorded) == (45, 29, sample.plan.num_texts, len(units), 3)
        assert found.texts_recorded == len(units[-1])
        assert found.bytes_staged > 0
        assert found.bytes_in_place == sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and "_build" not in p.parts) - _size(path, units[1])
        assert found.writer.alive
        assert found.writer.pid == os.getpid()
    assert store_progress(path).writer is None


def _size(path: Path, unit: Any) -> int:
    from kdstore.jsonfile import read_json

    return sum(entry["size"] for entry in read_json(path / f"_build/units/{unit.name}.json")["files"].values())


def test_a_store_that_was_just_begun_has_no_numbers_and_one_that_is_sealed_no_progress(sample: Any, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "store/_build").mkdir(parents=True)
    found = store_progress(tmp_path / "store")
    assert (found.units, found.images, found.writer) == (0, 0, None)
    assert store_progress(tmp_path / "nowhere") is None
    (copied / "_build").mkdir()
    assert store_progress(copied) is None


def test_info_and_unlock_say_what_they_found_and_did(
    sample: Any, tmp_path: Path, in_child: InChild, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kdstore(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kdstore", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out + captured.err

    def write_one_unit_and_die() -> None:
        writer = sample.open(path)
        sample.write_unit(writer, writer.pending()[0])
        os.kill(os.getpid(), signal.SIGKILL)

    path = tmp_path / "store"
    assert in_child(write_one_unit_and_die) == -signal.SIGKILL
    code, said = kdstore("store", "info", path)
    assert code == 0
    assert f"not complete, 1 of {len(sample.plan.units)} units recorded" in said
    assert "16 of 45" in said
    assert "dead; run the same command again" in said
    assert '"alive": false' in kdstore("store", "info", path, "--json")[1]
    code, said = kdstore("store", "unlock", path)
    assert code == 0
    assert f"was removed from {path}: it is dead." in said
    assert "nobody" in kdstore("store", "info", path)[1]
    assert "has no lock; nothing was done" in kdstore("store", "unlock", path)[1]
    with sample.open(path):
        assert "alive" in kdstore("store", "info", path)[1]
        code, said = kdstore("store", "unlock", path)
        assert code == 1
        assert "which is alive. With --force" in said
        assert f'"pid": {os.getpid()}' in kdstore("store", "unlock", path, "--force", "--json")[1]
    code, said = kdstore("store", "unlock", tmp_path / "nowhere")
    assert code == 1
    assert "There is no store" in said
    shutil.rmtree(path)
    sample.write(path)
    assert '"complete": true' in kdstore("store", "info", path, "--json")[1]
