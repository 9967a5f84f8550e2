"""The operations as commands: options reach the library, results are JSON, and what is wrong is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdstore.cli import main
from kdstore.store import open_store

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kdstore(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdstore", "store", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
        return int(exit.value.code or 0), *capsys.readouterr()

    return run


def test_a_store_cut_in_two_and_put_together_is_the_same(kdstore: Command, pristine: Path, sample: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("".join(f"{key}\n" for key, _ in sample.rows[30:]), encoding="utf-8")
    assert kdstore("subset", pristine, "--out", tmp_path / "a", "--rows", ":30")[0] == 0
    assert kdstore("subset", pristine, "--out", tmp_path / "b", "--keys", tmp_path / "keys")[0] == 0
    code, out, _ = kdstore("concat", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab", "--json")
    assert (code, json.loads(out)["digest"]) == (0, open_store(tmp_path / "ab").digest)
    code, out, _ = kdstore("diff", pristine, tmp_path / "ab", "--json")
    assert (code, json.loads(out)["same"]) == (0, True)
    code, out, _ = kdstore("diff", pristine, tmp_path / "a")
    assert (code, out.splitlines()[-1]) == (1, "they differ")


def test_recode_and_stats_take_their_options(kdstore: Command, pristine: Path, tmp_path: Path) -> None:
    options = ("--codec", "zstd", "--dtype", "float32", "--chunk-rows", 2, "--shard-rows", 8, "--arrays", "text/embedding,image/embedding")
    assert kdstore("recode", pristine, "--out", tmp_path / "out", *options)[0] == 0
    spec = open_store(tmp_path / "out").arrays["text/embedding"]
    assert (spec.dtype, spec.codecs, spec.chunk[0], spec.shard[0]) == ("float32", ("bytes", "zstd", "crc32c"), 2, 8)
    assert kdstore("stats", tmp_path / "out", "--max-samples", 7)[1].splitlines()[0].startswith("image/embedding: 44 rows, 0 NaN, 0 infinite")


def test_a_join_with_other_data_is_a_report(kdstore: Command, pristine: Path) -> None:
    code, out, _ = kdstore("join", pristine, "scenes/val:8", "--keys-only", "--json")
    report = json.loads(out)
    assert (code, report["matched"], report["missing_in_source"], report["missing_in_store"], report["content_differs"]) == (0, 0, 45, 8, None)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["subset", "STORE", "--out", "out", "--rows", "7"], "START:STOP"),
        (["subset", "STORE", "--out", "out", "--keys", "nowhere"], "a key per line"),
        (["recode", "STORE", "--out", "out"], "Nothing to change"),
        (["recode", "STORE", "--out", "STORE", "--codec", "zstd"], "is the store that is read"),
        (["recode", "STORE", "--out", "out", "--dtype", "int8"], "float16 or float32, found int8"),
        (["subset", "STORE", "--out", "out"], "Nothing to leave out"),
        (["concat", "STORE", "STORE", "--out", "out"], "45 keys are in more than one of the stores"),
    ],
)
def test_what_is_wrong_is_one_line(kdstore: Command, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = kdstore(*[str(pristine) if arg == "STORE" else arg for arg in args])
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert said in err
    assert not list(tmp_path.iterdir())
