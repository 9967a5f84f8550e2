"""Verify: structure before bytes, samples that say what they read, what cannot be read apart from what is damaged, exit codes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdstore import cli
from kdstore.errors import CannotRead, ConfigError
from kdstore.store import open_store, verify_store
from kdstore.store.verify import parse_sample

SHARD = "image/embedding/c/1/0/0"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; returns exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kdstore", "store", "verify", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_of_a_damaged_shard_the_rows_of_the_damaged_chunks_are_named(copied: Path) -> None:
    shard = copied / "image/tokens/c/2/0/0/0"  # rows 8 to 12, a chunk of 64 bytes each
    for chunk in (0, 2, 3):
        flip(shard, 64 * chunk + 5)
    assert [(damage.path, damage.rows) for damage in verify_store(copied).damaged] == [("image/tokens/c/2/0/0/0", (8, 9)), ("image/tokens/c/2/0/0/0", (10, 12))]


def test_structure_is_reported_without_reading_the_bytes_and_the_bytes_of_sound_files_are_read_all_the_same(copied: Path) -> None:
    os.truncate(copied / "image/embedding/c/0/0/0", 3)
    flip(copied / SHARD, 20)
    reported = []
    report = verify_store(copied, on_progress=lambda *args: reported.append(args[:3]))
    assert [damage.path for damage in report.damaged] == ["image/embedding/c/0/0/0", SHARD]
    files = json.loads((copied / "manifest.json").read_text())["files"]
    size = sum(entry["size"] for entry in files.values())
    assert (report.num_files, report.num_bytes) == (len(files), size)
    assert report.read_bytes == size - files["image/embedding/c/0/0/0"]["size"]
    assert [args for args in reported if args[0] == "bytes"][-1] == ("bytes", report.read_bytes, report.read_bytes)
    assert {args[0] for args in reported} == {"structure", "bytes"}


@pytest.mark.parametrize("share", [1, 20, 60, 100])
def test_a_sample_reads_its_share_or_what_it_must(pristine: Path, share: int) -> None:
    """Whatever the share: metadata, checks, offsets, and a chunk of every shard."""
    reports = [verify_store(pristine, sample=f"{share}%", seed=seed) for seed in range(8)]
    assert all(report.ok for report in reports)
    assert [report.seed for report in reports] == list(range(8))
    size = reports[0].num_bytes
    must = verify_store(pristine, sample="0.001%", seed=0).read_bytes
    assert 0.2 * size < must < 0.6 * size  # a store as small as this is mostly metadata
    assert np.mean([report.read_bytes for report in reports]) == pytest.approx(max(must, size * share / 100), rel=0.15)
    assert verify_store(pristine, sample=f"{share}%", seed=3).read_bytes == reports[3].read_bytes
    assert verify_store(pristine).seed is None


def test_any_sample_finds_a_shard_of_another_store_and_enough_of_them_find_a_flipped_bit(copied: Path) -> None:
    content = (copied / SHARD).read_bytes()
    (copied / SHARD).write_bytes((copied / "image/embedding/c/0/0/0").read_bytes())
    assert [damage.path for damage in verify_store(copied, sample="0.001%").damaged] == [SHARD]
    (copied / SHARD).write_bytes(content)
    flip(copied / "image/tokens/c/2/0/0/0", 64 * 2 + 5)
    found = [bool(verify_store(copied, sample="1%", seed=seed).damaged) for seed in range(30)]
    assert 1 <= sum(found) <= 29  # one chunk of four
    again = [bool(verify_store(copied, sample="1%", seed=seed).damaged) for seed in range(30)]
    assert found == again


@pytest.mark.parametrize("amount", [None, "0.001%", "100%"])
def test_damaged_checks_do_not_damn_the_shards(copied: Path, amount: str | None) -> None:
    flip(copied / "checks/image/tokens.npy", -1)
    assert [damage.path for damage in verify_store(copied, sample=amount).damaged] == ["checks/image/tokens.npy"]
    flip(copied / "image/tokens/c/2/0/0/0", 64 * 2 + 5)
    if amount != "0.001%":
        assert [(damage.path, damage.rows) for damage in verify_store(copied, sample=amount).damaged] == [
            ("checks/image/tokens.npy", None),
            ("image/tokens/c/2/0/0/0", (10, 11)),
        ]


def test_a_sample_is_a_share_or_an_amount() -> None:
    assert parse_sample("5%")(200) == 10
    assert parse_sample("1.5 kB")(200) == 1500
    for wrong in ("5", "0%", "0.0GB", "101%", "-1%", "5 PB", "", "1e3%"):
        with pytest.raises(ConfigError, match="is no sample"):
            parse_sample(wrong)


def test_exit_codes_are_whole_damaged_and_cannot_be_read(copied: Path, tmp_path: Path, verify: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = verify(copied, "--sample", "50%", "--json")
    assert code == 0
    assert json.loads(out)["damaged"] == []
    code, out, err = verify(copied, "--sample", "50%", "--seed", 4)
    assert code == 0
    assert "% of the bytes read (--seed 4), no damage in what was read" in out
    flip(copied / SHARD, 20)
    code, out, err = verify(copied)
    assert code == 1
    assert f"damaged: {SHARD} (rows 16 to 31) does not match the crc32c of these rows\n" in err
    assert err.endswith(f"then: kdstore store verify {copied}\n")
    assert "not whole" in out
    os.truncate(copied / "image/tokens/c/2/0/0/0", 3)
    flip(copied / "image/tokens/c/3/0/0/0", 64 + 5)
    err = verify(copied)[2]
    assert "damaged: image/tokens/c/2/0/0/0 (rows 8 to 11) has 3 bytes, expected 324\n" in err
    assert "damaged: image/tokens/c/3/0/0/0 (row 13) does not match" in err
    for wrong in (("--recompute", -2), ("--sample", "-5%"), ("--smaple", "5%")):
        code, _, err = verify(copied, *wrong)
        assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), wrong
    (copied / "manifest.json").write_text("{}")
    code, _, err = verify(copied)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("damaged: manifest.json does not match the digest inside it")
    (tmp_path / "begun" / "_build").mkdir(parents=True)
    for path in (tmp_path / "nothing", tmp_path / "begun", copied / "zarr.json"):
        code, _, err = verify(path)
        assert code == 2
        assert len(err.splitlines()) == 1


def test_what_cannot_be_read_is_no_damage(copied: Path, in_child: Callable[[Callable[[], None]], int]) -> None:
    """Rights bind everybody but root, so a child gives up being root."""

    def as_another() -> None:
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        report = verify_store(copied)
        assert [(damage.path, damage.rows) for damage in report.unreadable] == [(SHARD, (16, 32))]
        assert "Permission denied" in report.unreadable[0].reason
        assert not report.damaged
        with pytest.raises(CannotRead, match=f"{SHARD}.*Permission denied"):
            open_store(copied).gather("image/embedding", [17])
        os.chmod(copied, 0)
        for read in (open_store, verify_store):
            with pytest.raises(CannotRead, match="Permission denied"):
                read(copied)

    for folder, _, names in os.walk(copied.parent):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            os.chmod(path, 0o777)
            if os.geteuid() == 0:
                os.chown(path, 65534, 65534)
    os.chmod(copied / SHARD, 0)
    assert in_child(as_another) == 0
    os.chmod(copied, 0o777)


def test_arrays_and_files_that_contradict_each_other_are_found_before_the_bytes(copied: Path) -> None:
    from kdstore.jsonfile import write_json

    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"][SHARD]["rows"] = [0, 16]
    del manifest["files"]["index/text/00001.parquet"]
    shutil.copyfile(copied / "index/image/00000.parquet", copied / "index/image/00002.parquet")
    manifest["files"]["index/image/00002.parquet"] = {**manifest["files"]["index/image/00000.parquet"], "rows": [32, 45]}
    write_json(copied / "manifest.json", manifest)
    assert [(damage.path, damage.rows, damage.reason[:20]) for damage in verify_store(copied).damaged] == [
        ("image/embedding/c/1/0/0", (16, 32), "is listed with the r"),
        ("index/image/00002.parquet", (32, 45), "is not an index file"),
        ("index/text/00001.parquet", None, "is not in the manife"),
        ("index/text/00001.parquet", (16, 32), "is not listed in the"),
    ]
