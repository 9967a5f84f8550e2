"""A version without some images: nothing of them is left but their hashes, everything else is as it was, and readers take the rows as missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdstore.data.source import LoadedImage
from kdstore.errors import ConfigError, DamagedStore, IdentityMismatch, JoinError, MissingFeature
from kdstore.jsonfile import digest_of, read_json, write_json
from kdstore.store import child_identity, concat_stores, is_successor, join_sources, open_family, open_store, subset_store, verify_store, withdraw_rows
from kdstore.store.manifest import read_manifest
from kdstore.store.share import Choice, pull_store


def bytes_of(store: Path) -> bytes:
    """All that a stranger can read of a store: its files as they are, and its tables as texts."""
    tables = [str(pq.read_table(file).to_pydict()).encode() for file in store.rglob("*.parquet")]
    return b"".join([*(file.read_bytes() for file in store.rglob("*") if file.is_file()), *tables])


def withdrawn(store: Path, sample: Any, out: Path, images: list[int]) -> Any:
    return withdraw_rows(store, out, keys=[sample.rows[i][0] for i in images])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 44), min_size=1, max_size=6))
def test_withdrawn_rows_are_missing_and_all_others_are_as_they_were(
    pristine: Path, sample: Any, tmp_path_factory: pytest.TempPathFactory, images: set[int]
) -> None:
    out = tmp_path_factory.mktemp("withdrawn") / "store"
    made = withdrawn(pristine, sample, out, sorted(images))
    old, new = open_store(pristine), open_store(out)
    assert verify_store(out).ok
    assert (made.digest, made.parent, made.images) == (new.digest, old.digest, len(images))
    gone = np.isin(np.arange(45), sorted(images))
    texts_gone = np.repeat(gone, np.diff(sample.plan.offsets))
    for name, spec in old.arrays.items():
        lost = gone if spec.side == "image" else texts_gone
        for view in range(spec.views):
            before, after = (store.gather(name, np.arange(spec.shape[0]), view if spec.has_views else None) for store in (old, new))
            assert before[~lost].tobytes() == after[~lost].tobytes()
            assert np.isnan(after[lost]).all() if spec.dtype.startswith("float") else not after[lost].any()
    assert new.withdrawn.tolist() == sorted(images)
    assert [key for key in new.keys().tolist() if not key.startswith("withdrawn:")] == old.keys()[~gone].tolist()
    assert np.array(new.index("image", "reason").to_pylist())[gone].tolist() == ["withdrawn"] * len(images)
    assert np.array(new.captions())[~texts_gone].tolist() == np.array(old.captions())[~texts_gone].tolist()
    assert new.fingerprint != old.fingerprint


def test_neither_key_nor_caption_nor_features_remain_and_the_hash_only_in_the_manifest(pristine: Path, sample: Any, tmp_path: Path) -> None:
    withdrawn(pristine, sample, tmp_path / "out", [6, 37])
    left = bytes_of(tmp_path / "out")
    assert bytes_of(pristine).count(b"caption 6 ") > 0
    for secret in (*(sample.rows[i][0].encode() for i in (6, 37)), b"caption 6 ", b"caption 37 ", sample.arrays["image/embedding"][6, 1].tobytes()):
        assert secret not in left
        assert secret in bytes_of(pristine)
    others = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file() and file.name != "manifest.json")
    assert f"{6:064x}".encode() not in others
    assert read_json(tmp_path / "out/manifest.json")["identity"]["withdrawn"]["sha256"] == [f"{6:064x}", f"{37:064x}"]


def test_neither_key_nor_content_of_a_withdrawn_image_joins(pristine: Path, sample: Any, tmp_path: Path) -> None:
    class Owner:
        """Somebody who still has the images 5 and 6."""

        spec, notices = "owner", ()

        def __len__(self) -> int:
            return 2

        def key(self, i: int) -> str:
            return sample.rows[5 + i][0]

        def captions(self, i: int) -> Any:
            return sample.rows[5 + i][1]

        def image(self, i: int) -> Any:
            return LoadedImage(Image.new("RGB", (2, 2)), f"{5 + i:064x}")

    withdrawn(pristine, sample, tmp_path / "out", [5])
    for by_content in (False, True):
        assert join_sources(open_store(pristine), Owner(), by_content=by_content).store_row_of_source.tolist() == [5, 6]
        assert join_sources(open_store(tmp_path / "out"), Owner(), by_content=by_content).store_row_of_source.tolist() == [-1, 6]


def test_untouched_files_are_the_same_files_and_of_many_shards_one_is_written(copied: Path, sample: Any, tmp_path: Path) -> None:
    made = withdrawn(copied, sample, tmp_path / "out", [0])  # without captions, in the first of three units
    files = {file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()}
    written = {file for file in files if not (copied / file).samefile(tmp_path / "out" / file)}
    shards = {"image/embedding/c/0/0/0", "image/tokens/c/0/0/0/0", "image/valid/c/0", "index/image/00000.parquet"}
    sealing = {file for file in files if file.startswith("checks/") or file.endswith(("zarr.json", "offsets.npy", "manifest.json", "run.json"))}
    assert written == shards | sealing
    assert made.files_written == len(shards) + len([file for file in sealing if file.startswith("checks/image/")])


def test_images_of_the_same_bytes_go_together_and_hashes_choose_like_keys(sample: Any, tmp_path: Path) -> None:
    class Twice(type(sample)):  # type: ignore[misc]
        @staticmethod
        def index_row(row: int) -> dict[str, Any]:
            return sample.index_row(3 if row == 30 else row)

    source = Twice(sample.rows, sample.plan, sample.specs, sample.arrays, sample.identity)
    source.write(tmp_path / "store")
    by_key = withdrawn(tmp_path / "store", sample, tmp_path / "a", [3])
    by_hash = withdraw_rows(tmp_path / "store", tmp_path / "b", sha256=[f"sha256:{3:064X}"])
    assert by_key.images == by_hash.images == 2
    assert by_key.digest == by_hash.digest
    assert open_store(tmp_path / "a").withdrawn.tolist() == [3, 30]


def test_a_second_time_changes_nothing_and_later_versions_name_all_before_them(pristine: Path, sample: Any, tmp_path: Path) -> None:
    first = withdrawn(pristine, sample, tmp_path / "first", [4])
    assert withdrawn(pristine, sample, tmp_path / "first", [4]).digest == first.digest
    for again in ({"keys": [sample.rows[4][0]]}, {"sha256": [f"{4:064x}"]}):
        found = withdraw_rows(tmp_path / "first", tmp_path / "again", **again)
        assert (found.digest, found.images) == (first.digest, 0)
        assert not (tmp_path / "again").exists()
    second = withdraw_rows(tmp_path / "first", tmp_path / "second", keys=[sample.rows[5][0]], sha256=[f"{4:064x}"])
    assert (second.images, second.absent) == (1, ())
    said = open_store(tmp_path / "second").identity["withdrawn"]
    assert said == {"rows": [4, 5], "sha256": [f"{4:064x}", f"{5:064x}"], "versions": [first.parent, first.digest]}
    zero, one, two = (read_manifest(path) for path in (pristine, tmp_path / "first", tmp_path / "second"))
    assert [is_successor(*pair) for pair in ((one, zero), (two, zero), (two, one))] == [True] * 3
    assert [is_successor(*pair) for pair in ((zero, one), (one, two), (one, one), (zero, zero))] == [False] * 4
    subset_store(tmp_path / "second", tmp_path / "part", rows=slice(0, 8))
    part = read_manifest(tmp_path / "part")
    assert "withdrawn" not in part.content["identity"]
    assert not is_successor(part, zero)


def test_a_store_that_was_interrupted_goes_on_and_has_the_same_digest(pristine: Path, sample: Any, tmp_path: Path, in_child: Any, die_at_rename: Any) -> None:
    whole = withdrawn(pristine, sample, tmp_path / "whole", [2, 40])

    def work() -> None:
        die_at_rename(25)
        withdrawn(pristine, sample, tmp_path / "out", [2, 40])

    assert in_child(work) == -9
    assert not (tmp_path / "out/manifest.json").exists()
    assert withdrawn(pristine, sample, tmp_path / "out", [2, 40]).digest == whole.digest
    assert verify_store(tmp_path / "out").ok
    assert verify_store(pristine).ok


def test_a_child_follows_its_parent(sample: Any, tmp_path: Path) -> None:
    parent = sample.of_images(20)
    parent.write(tmp_path / "parent")
    store = open_store(tmp_path / "parent")
    tokens = type(sample)(parent.rows, parent.plan, [sample.specs[1]], sample.arrays, child_identity(store, sample.identity))
    spec = tokens.specs[0]
    tokens.specs[0] = type(spec)(spec.name, (20, *spec.shape[1:]), *[getattr(spec, name) for name in ("dtype", "chunk", "shard", "codecs", "dims")])
    tokens.write(tmp_path / "child")
    withdrawn(tmp_path / "parent", sample, tmp_path / "new", [7])
    with pytest.raises(ConfigError, match="--parent"):
        withdrawn(tmp_path / "child", sample, tmp_path / "newchild", [7])
    with pytest.raises(IdentityMismatch, match="without the same images"):
        withdraw_rows(tmp_path / "child", tmp_path / "newchild", keys=[sample.rows[8][0]], parent=tmp_path / "new")
    withdraw_rows(tmp_path / "child", tmp_path / "newchild", keys=[sample.rows[7][0]], parent=tmp_path / "new")
    family = open_family(tmp_path / "new", tmp_path / "newchild")
    assert np.isnan(family.gather("image/tokens", [7])).all()
    assert is_successor(read_manifest(tmp_path / "newchild"), read_manifest(tmp_path / "child"))


def test_what_cannot_be_withdrawn_is_said_and_nothing_is_written(pristine: Path, sample: Any, tmp_path: Path) -> None:
    with pytest.raises(JoinError, match="none of the 1 images"):
        withdraw_rows(pristine, tmp_path / "out", keys=["nobody"])
    with pytest.raises(ConfigError, match="no sha256"):
        withdraw_rows(pristine, tmp_path / "out", sha256=["abc"])
    found = withdraw_rows(pristine, tmp_path / "some", keys=["nobody", sample.rows[1][0]])
    assert (found.images, found.absent) == (1, ("nobody",))
    assert not (tmp_path / "out").exists()
    pull_store(str(pristine), tmp_path / "part", choice=Choice(arrays=("text/embedding",)))
    with pytest.raises(MissingFeature, match="is a part of its store"):
        withdrawn(tmp_path / "part", sample, tmp_path / "out", [1])
    with pytest.raises(ConfigError, match="is the store that is read"):
        withdrawn(pristine, sample, pristine, [1])


def test_two_withdrawn_stores_are_put_together_without_their_row_numbers(pristine: Path, sample: Any, tmp_path: Path) -> None:
    for name, rows, image in (("a", slice(0, 16), 1), ("b", slice(16, 40), 17)):
        subset_store(pristine, tmp_path / name, rows=rows)
        withdrawn(tmp_path / name, sample, tmp_path / f"{name}2", [image])
    concat_stores([tmp_path / "a2", tmp_path / "b2"], tmp_path / "both")
    both = open_store(tmp_path / "both")
    assert "withdrawn" not in both.identity
    assert np.flatnonzero(~both.image_valid).tolist() == [1, 17, 20]


def test_a_manifest_that_says_nonsense_of_withdrawn_rows_is_damaged(copied: Path) -> None:
    manifest = read_json(copied / "manifest.json")
    good = {"rows": [1], "sha256": [], "versions": []}
    for wrong in ({"rows": [45]}, {"rows": [2, 1]}, {"rows": ["1"]}, {"sha256": ["x"]}, {"versions": [1]}, {"rows": None}):
        identity = {**manifest["identity"], "withdrawn": {**good, **wrong}}
        write_json(copied / "manifest.json", {**manifest, "identity": identity, "identity_digest": digest_of(identity)})
        with pytest.raises(DamagedStore, match="is not a manifest"):
            open_store(copied)
