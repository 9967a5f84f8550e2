"""Writing: what a Zarr reader sees, crashes and resumes, locks, refusals and full disks."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from kdstore.data.source import Caption
from kdstore.errors import CannotWrite, DiskFull, IdentityMismatch, IncompleteStore, StoreError
from kdstore.store import Plan, StoreWriter, embedding_array, open_store, verify_store
from kdstore.store.derive import fitted

InChild = Callable[[Callable[[], None]], int]


def test_zarr_python_reads_every_array_bit_by_bit(pristine: Path, sample: Any) -> None:
    for spec in sample.specs:
        array = zarr.open_array(pristine / spec.name, mode="r")
        assert array.metadata.dimension_names == spec.dims
        assert array[...].tobytes() == sample.arrays[spec.name].tobytes()
    valid = zarr.open_group(pristine, mode="r")["image/valid"][...]
    assert valid.tolist() == [i != sample.undecodable for i in range(45)]


def test_tensorstore_reads_every_array_bit_by_bit(pristine: Path, sample: Any) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    for spec in sample.specs:
        array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(pristine / spec.name)}}).result()
        assert np.asarray(array.read().result()).tobytes() == sample.arrays[spec.name].tobytes()


def test_metadata_names_portable_codecs_only(pristine: Path) -> None:
    for path in pristine.rglob("zarr.json"):
        assert "numcodecs" not in path.read_text()


def test_the_index_says_what_is_known_of_every_row(pristine: Path, sample: Any) -> None:
    images = pq.read_table(pristine / "index/image").to_pylist()
    assert images == [{"row": i, "key": sample.rows[i][0], **sample.index_row(i)} for i in range(45)]
    texts = pq.read_table(pristine / "index/text").to_pylist()
    assert [(text["row"], text["image_row"], text["caption"]) for text in texts] == [
        (int(sample.plan.offsets[i]) + j, i, caption.text) for i, (_, captions) in enumerate(sample.rows) for j, caption in enumerate(captions)
    ]


@pytest.mark.parametrize("step", [1, 3, 16])
def test_the_bytes_do_not_depend_on_how_rows_are_batched(sample: Any, pristine: Path, tmp_path: Path, step: int) -> None:
    sample.write(tmp_path / "again", step)
    assert (tmp_path / "again/manifest.json").read_bytes() == (pristine / "manifest.json").read_bytes()


def test_an_exception_discards_the_unit_and_a_resume_ends_in_the_same_manifest(sample: Any, pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    with sample.open(path) as writer:
        units = writer.pending()
        sample.write_unit(writer, units[0])
        with pytest.raises(RuntimeError, match="teacher"), writer.attempt(units[1]) as attempt:  # noqa: PT012
            attempt.append("image/embedding", sample.arrays["image/embedding"][16:20])
            raise RuntimeError("the teacher failed")
        assert writer.pending() == units[1:]
        with pytest.raises(IncompleteStore, match="units are not recorded"):
            writer.finalise({})
    with pytest.raises(IncompleteStore, match="no manifest"):
        open_store(path)
    assert sample.write(path) == open_store(pristine).digest
    assert (path / "manifest.json").read_bytes() == (pristine / "manifest.json").read_bytes()
    assert verify_store(path).ok


def test_a_first_unit_that_fails_leaves_the_path_to_other_settings(sample: Any, tmp_path: Path) -> None:
    for existed in (False, True):
        path = tmp_path / f"store-{existed}"
        if existed:
            path.mkdir()
        with pytest.raises(RuntimeError), sample.open(path) as writer, writer.attempt(writer.pending()[0]):
            raise RuntimeError("the teacher failed")
        assert path.exists() == existed
        sample.open(path, identity={"teacher": "another"}).close()


@pytest.mark.parametrize("name", ["file", "file/store"])
def test_a_path_that_cannot_be_a_folder_is_an_error_of_ours(sample: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"Cannot write .*: Not a directory"):
        sample.open(tmp_path / name)


def test_recorded_files_that_are_gone_and_units_whose_record_is_damaged_are_written_again(sample: Any, pristine: Path, tmp_path: Path) -> None:
    with sample.open(tmp_path / "store") as writer:
        units = writer.pending()
        for unit in units[:3]:
            sample.write_unit(writer, unit)
    (tmp_path / "store/image/embedding/c/0/0/0").unlink()
    record = tmp_path / f"store/_build/units/{units[1].name}.json"
    record.write_bytes(record.read_bytes()[:-9])
    with sample.open(tmp_path / "store") as writer:
        assert writer.pending() == (*units[:2], *units[3:])
    assert sample.write(tmp_path / "store") == open_store(pristine).digest


def test_an_attempt_that_ends_after_the_store_was_sealed_changes_nothing(sample: Any, pristine: Path, tmp_path: Path) -> None:
    with sample.open(tmp_path / "store") as writer:
        unit = writer.pending()[-1]
        late = writer.attempt(unit)
        with late as attempt:
            for spec in sample.specs:
                if spec.side == unit.side:
                    attempt.append(spec.name, np.zeros_like(sample.arrays[spec.name][unit.start : unit.stop]))
            for pending in writer.pending():
                sample.write_unit(writer, pending)
            digest = writer.finalise({})
            with pytest.raises(CannotWrite, match="No such file"), writer.attempt(unit):  # its folder is not made again
                pass
    assert digest == open_store(pristine).digest
    assert verify_store(tmp_path / "store").ok
    assert not (tmp_path / "store/_build").exists()


def test_what_a_process_left_that_ended_between_manifest_and_cleaning_up_is_removed(sample: Any, copied: Path) -> None:
    (copied / "_build/attempts/image-00000-x").mkdir(parents=True)
    (copied / "_build/lock.json").touch()
    with sample.open(copied) as writer:
        assert writer.complete
    assert not (copied / "_build").exists()


def test_a_late_attempt_never_replaces_a_recorded_unit(sample: Any, tmp_path: Path) -> None:
    with sample.open(tmp_path / "store") as writer:
        unit = writer.pending()[-1]
        zeros = {name: np.zeros_like(array) for name, array in sample.arrays.items()}
        with writer.attempt(unit) as late:
            sample.write_unit(writer, unit)
            late.append("text/embedding", zeros["text/embedding"][unit.start : unit.stop])
            late.append("text/length", zeros["text/length"][unit.start : unit.stop])
        for unit in writer.pending():
            sample.write_unit(writer, unit)
        writer.finalise({})
    store = open_store(tmp_path / "store")
    assert np.array_equal(store.gather("text/length", np.arange(store.num_texts)), sample.arrays["text/length"])


def test_another_identity_is_refused_with_the_fields_that_differ(sample: Any, pristine: Path, tmp_path: Path) -> None:
    other = {**sample.identity, "teacher": {**sample.identity["teacher"], "name": "scenes-L"}, "precision": "bf16"}
    with pytest.raises(IdentityMismatch, match=r'identity.precision: there nothing, asked "bf16"; identity.teacher.name: there "scenes-S", asked "scenes-L"'):
        sample.open(pristine, identity=other)
    sample.open(tmp_path / "store").close()
    with pytest.raises(IdentityMismatch, match=r"plan\.fingerprint"):
        sample.open(tmp_path / "store", plan=Plan.freeze([*sample.rows[:-1], ("x", (Caption("a"),))], unit_rows=16))
    plan = Plan.freeze(sample.rows, unit_rows=32)
    with pytest.raises(IdentityMismatch, match=r"holds other features \(plan\.unit_rows: there 16, asked 32\)"):
        sample.open(tmp_path / "store", plan=plan, arrays=[fitted(spec, plan) for spec in sample.specs])
    with pytest.raises(IdentityMismatch, match=r"arrays\.image/embedding\.data_type"):
        sample.open(tmp_path / "store", arrays=[dataclasses.replace(spec, dtype="float32") for spec in sample.specs])


def test_a_complete_store_has_nothing_pending(sample: Any, pristine: Path) -> None:
    with sample.open(pristine) as writer:
        assert writer.complete
        assert writer.pending() == ()
        assert writer.finalise({}) == open_store(pristine).digest
    assert not (pristine / "_build").exists()


def test_a_folder_of_something_else_is_not_written_to(sample: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match="neither empty nor a store"):
        sample.open(tmp_path)


def test_rows_that_do_not_fit_are_refused(sample: Any, tmp_path: Path) -> None:
    with sample.open(tmp_path / "store") as writer:
        image, block = writer.pending()[0], sample.arrays["image/embedding"]
        with pytest.raises(ValueError, match="expected rows of shape"), writer.attempt(image) as attempt:
            attempt.append("image/embedding", block[:4].astype("float32"))
        with pytest.raises(ValueError, match="17 rows appended"), writer.attempt(image) as attempt:
            attempt.append("image/embedding", block[:17])
        with pytest.raises(ValueError, match="15 rows appended to image-00000, expected 16"), writer.attempt(image) as attempt:  # noqa: PT012
            attempt.append("image/embedding", block[:15])
            attempt.append("image/tokens", sample.arrays["image/tokens"][:16])
            attempt.index([sample.index_row(i) for i in range(16)])
        with pytest.raises(ValueError, match="row 3 is not valid but not NaN"), writer.attempt(image) as attempt:  # noqa: PT012
            attempt.append("image/embedding", block[:16])
            attempt.append("image/tokens", sample.arrays["image/tokens"][:16])
            attempt.index([{**sample.index_row(i), "valid": i != 3} for i in range(16)])
        assert len(writer.pending()) == len(sample.plan.units)


@pytest.mark.parametrize("limit", [150, 700, 3000])
def test_a_full_disk_leaves_the_store_as_it_was(sample: Any, pristine: Path, tmp_path: Path, in_child: InChild, limit: int) -> None:
    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(DiskFull, match="No space left"):
            sample.write(tmp_path / "store")
        assert not any((tmp_path / "store/_build/attempts").glob("*"))

    assert in_child(fill_up) == 0
    assert sample.write(tmp_path / "store") == open_store(pristine).digest
    assert verify_store(tmp_path / "store").ok


def test_stores_without_texts_or_without_images_can_be_written(sample: Any, tmp_path: Path) -> None:
    for name, rows in (("no-texts", [("a", ()), ("b", ())]), ("empty", [])):
        plan = Plan.freeze(rows)
        with StoreWriter.open(tmp_path / name, plan=plan, arrays=[embedding_array(plan, "image", 3), embedding_array(plan, "text", 3)], identity={}) as writer:
            for unit in writer.pending():
                with writer.attempt(unit) as attempt:
                    attempt.append("image/embedding", np.ones((len(unit), 1, 3), "float16"))
                    attempt.index([sample.index_row(0)] * len(unit))
            writer.finalise({})
        store = open_store(tmp_path / name)
        assert (store.num_images, store.num_texts, store.captions()) == (len(rows), 0, [])
        assert store.gather("text/embedding", []).shape == (0, 3)
        assert store.keys().tolist() == [key for key, _ in rows]
        assert zarr.open_array(tmp_path / name / "image/embedding", mode="r").shape == (len(rows), 1, 3)


def test_what_goes_beside_the_manifest_does_not_change_the_digest(sample: Any, pristine: Path) -> None:
    manifest = json.loads((pristine / "manifest.json").read_text())
    assert not {"run.json", "stats.json"} & set(manifest["files"])
    assert json.loads((pristine / "run.json").read_text())["pid"]
