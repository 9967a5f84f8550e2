"""Nothing reads as zeros: every kind of damage to every file is found by verify and by whoever reads it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from kdstore.errors import DamagedStore, StoreError
from kdstore.jsonfile import write_json
from kdstore.store import ArraySpec, open_store, verify_store
from kdstore.store.layout import ZSTD
from kdstore.store.shard import crc32c, decode_chunk, zstd_content_size

from .conftest import Sample


def read_all(path: Path) -> None:
    """Touch every byte that a training run could."""
    store = open_store(path)
    store.keys(), store.captions(), store.image_sha256()
    assert store.offsets is not None
    for name, spec in store.arrays.items():
        for view in range(spec.views):
            store.gather(name, np.arange(spec.shape[0]), view if spec.has_views else None)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def link(path: Path) -> None:
    """Put the right bytes where somebody else could change them."""
    store = next(folder for folder in path.parents if (folder / "manifest.json").exists())
    outside = store.parent / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


DAMAGE = [flip, flip_last, shorten, empty, lengthen, Path.unlink, link]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_to_a_file_of_any_kind_is_found_by_verify_and_by_a_reader(copied: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    files = json.loads((copied / "manifest.json").read_text())["files"]
    read_all(copied)
    one_of_each_kind = {re.sub(r"\d+", "N", name): name for name in files}.values()
    for name in files if damage is flip else one_of_each_kind:
        kept = (copied / name).read_bytes()
        damage(copied / name)
        (found,) = verify_store(copied).damaged
        assert found.path == name
        start, stop = found.rows or (0, 0)
        first, last = files[name].get("rows", (0, 0))
        assert first <= start <= stop <= last  # the rows of the damaged chunk, or all
        assert (start < stop) == (first < last)
        with pytest.raises(DamagedStore, match=f"{name}.*rows {first} to" if name.endswith(".parquet") else name):
            read_all(copied)
        (copied / name).unlink(missing_ok=True)
        (copied / name).write_bytes(kept)
    assert verify_store(copied).ok


@pytest.mark.parametrize("damage", [flip, flip_last, shorten, empty], ids=lambda damage: damage.__name__)
def test_damage_to_the_manifest_is_found(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied / "manifest.json")
    for read in (open_store, verify_store):
        with pytest.raises(StoreError):
            read(copied)


def test_two_shards_that_change_places_are_found(copied: Path) -> None:
    first, second = copied / "image/embedding/c/0/0/0", copied / "image/embedding/c/1/0/0"
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    assert [(damage.path, damage.rows) for damage in verify_store(copied).damaged] == [
        ("image/embedding/c/0/0/0", (0, 16)),
        ("image/embedding/c/1/0/0", (16, 32)),
    ]
    with pytest.raises(DamagedStore, match="the chunk of rows 0 to 15 does not match its crc32c"):
        open_store(copied).gather("image/embedding", [3])


def test_a_shard_of_another_store_is_found(copied: Path, sample: Sample, tmp_path: Path) -> None:
    other = dataclasses.replace(sample, arrays={name: array + array.dtype.type(1) for name, array in sample.arrays.items()})
    other.write(tmp_path / "other")
    for name, rows in {
        "image/embedding/c/1/0/0": (16, 32),
        "image/tokens/c/9/0/0/0": (36, 40),
        "text/embedding/c/2/0": (32, 48),
        "text/length/c/0": (0, 16),
    }.items():
        kept = (copied / name).read_bytes()
        shutil.copyfile(tmp_path / "other" / name, copied / name)
        assert [(damage.path, damage.rows) for damage in verify_store(copied).damaged] == [(name, rows)]
        for row in rows[0], rows[1] - 1:
            with pytest.raises(DamagedStore, match=rf"{name}.*rows? \d+"):
                open_store(copied).gather("/".join(name.split("/")[:2]), [row])
        (copied / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("name", "place", "rows"), [("image/tokens/c/0/0/0/0", 1, (0, 4)), ("image/embedding/c/2/0/0", 1, (32, 45)), ("text/embedding/c/0/0", 0, (0, 16))]
)
def test_a_shard_that_lacks_a_chunk_is_damaged_and_not_fill(copied: Path, sample: Sample, name: str, place: int, rows: tuple[int, int]) -> None:
    """The index says so with a right crc32c, as a writer that left out fill would have it."""
    array = "/".join(name.split("/")[:2])
    spec = open_store(copied).arrays[array]
    content = (copied / name).read_bytes()
    size = 16 * spec.chunks_per_shard
    index = np.frombuffer(content[-size - 4 : -4], "<u8").copy()
    index[2 * place : 2 * place + 2] = 2**64 - 1
    (copied / name).write_bytes(content[: -size - 4] + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"))
    assert [(damage.path, damage.rows) for damage in verify_store(copied).damaged] == [(name, rows)]
    for row in range(*rows):
        with pytest.raises(DamagedStore, match=rf"{name}: the chunk of row \d+ is missing .*rows {rows[0]} to {rows[1] - 1}"):
            open_store(copied).gather(array, [row])


def test_a_file_cut_after_it_was_opened_is_an_error(copied: Path) -> None:
    store = open_store(copied)
    store.gather("text/embedding", [0])
    os.truncate(copied / "text/embedding/c/0/0", 1)
    with pytest.raises(DamagedStore, match="ends early"):
        store.gather("text/embedding", [0])


def test_a_file_that_the_manifest_does_not_list_is_reported(copied: Path) -> None:
    (copied / "image/embedding/c/9").mkdir()
    (copied / "image/embedding/c/9/0").write_bytes(b"x")
    (copied / "README.md").write_text("ours, beside the manifest")
    assert [(damage.path, damage.reason) for damage in verify_store(copied).damaged] == [("image/embedding/c/9/0", "is not in the manifest")]


@given(st.integers(0, 70000), st.integers(1, 9))
def test_the_size_in_a_zstd_frame_is_read_before_decoding(size: int, level: int) -> None:
    frame = np.frombuffer(Zstd(level=level).encode(bytes(size)), np.uint8)
    assert zstd_content_size(frame) == size


def test_a_zstd_chunk_of_another_size_is_damaged_and_not_half_filled() -> None:
    spec = ArraySpec("text/a", (4, 6), "float16", (4, 6), (4, 6), ZSTD, ("text", "channel"))
    assert len(decode_chunk(spec, np.frombuffer(Zstd().encode(bytes(48)), np.uint8))) == 48
    for content in (Zstd().encode(bytes(47)), Zstd().encode(bytes(1 << 20)), b"", b"no frame"):
        with pytest.raises(ValueError, match="does not hold 48 bytes"):
            decode_chunk(spec, np.frombuffer(content, np.uint8))


def _forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a manifest that proves itself and lies."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    write_json(path / "manifest.json", manifest)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a//b", "./a", "", "a\\b", "manifest.json", "a\0b"])
def test_a_path_that_leaves_the_store_is_refused(copied: Path, name: str) -> None:
    _forge(copied, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(DamagedStore, match="is not a path inside a store"):
        open_store(copied)


def test_a_gigantic_declared_shape_allocates_nothing(copied: Path) -> None:
    def lie(manifest: dict[str, Any]) -> None:
        for name, metadata in manifest["arrays"].items():
            if name.startswith("image/"):
                metadata["shape"][0] = 10**13
                metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = 2**31
                metadata["codecs"][0]["configuration"]["chunk_shape"][0] = 2**14
                content = json.dumps(metadata).encode()
                (copied / name / "zarr.json").write_bytes(content)
                manifest["files"][f"{name}/zarr.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    _forge(copied, lambda manifest: manifest["plan"].update(images=10**13, unit_rows=2**31))
    with pytest.raises(DamagedStore, match="has 45 rows, expected 10000000000000"):
        open_store(copied)
    _forge(copied, lie)
    with pytest.raises(DamagedStore, match="1220703126 uint32"):
        open_store(copied).gather("image/embedding", [0])
    with pytest.raises(DamagedStore, match="610351563 uint32"):
        assert open_store(copied).image_valid is not None


@pytest.mark.parametrize("name", ["index/offsets.npy", "checks/image/embedding.npy", "index/text/00000.parquet", "text/embedding/zarr.json"])
def test_a_listed_file_of_another_kind_is_damage(copied: Path, name: str) -> None:
    (copied / name).write_bytes(b"another kind")
    _forge(copied, lambda manifest: manifest["files"][name].update(size=12, sha256=hashlib.sha256(b"another kind").hexdigest()))
    assert [damage.path for damage in verify_store(copied).damaged] == [name]
    with pytest.raises(DamagedStore, match=name):
        read_all(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files=[1]),
        lambda manifest: manifest["identity"].update(teacher="another"),
        lambda manifest: manifest["files"]["zarr.json"].update(size="1"),
        lambda manifest: manifest.pop("plan"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(copied: Path, change: Callable[[dict[str, Any]], None]) -> None:
    _forge(copied, change)
    with pytest.raises(DamagedStore, match="is not a manifest of format 1"):
        open_store(copied)


def test_another_format_is_refused(copied: Path) -> None:
    _forge(copied, lambda manifest: manifest.update(format=2))
    with pytest.raises(StoreError, match="is of format 2, expected 1"):
        open_store(copied)
