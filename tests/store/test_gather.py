"""Reading rows: equal to NumPy and to zarr-python for any layout, and the same from threads, forks and spawned processes."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import pickle
import shutil
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from kdstore.data.source import Caption
from kdstore.errors import DamagedStore, IncompleteStore, MissingFeature, StoreError, StoreNotFound
from kdstore.jsonfile import write_json
from kdstore.store import ArraySpec, Plan, Store, StoreWriter, open_store, token_array
from kdstore.store import gather as gathering
from kdstore.store.kernel import COMPILED, COPIED, UNKNOWN, copy_rows
from kdstore.store.layout import DTYPES, PLAIN, ZSTD
from kdstore.store.shard import crc32c, decode_chunk, decode_chunk_with_zarr


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Plan, ArraySpec, np.ndarray]:
    """Any array of format 1 and its values: rank, views, dtype, chunk and shard rows, codecs, a partial last shard."""
    unit_rows = draw(st.sampled_from([1, 4, 16]))
    shard_rows = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if n <= unit_rows]))
    chunk_rows = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if n <= shard_rows]))
    side, rows = draw(st.sampled_from(["image", "text"])), draw(st.integers(1, 40))
    views = (draw(st.integers(1, 3)),) if side == "image" else ()
    row_shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
    plan = Plan.freeze([(str(i), (Caption("c"),)) for i in range(rows)], unit_rows=unit_rows)
    spec = ArraySpec(
        f"{side}/features",
        (rows, *views, *row_shape),
        draw(st.sampled_from(DTYPES)),
        (chunk_rows, *(1 for _ in views), *row_shape),
        (shard_rows, *views, *row_shape),
        draw(st.sampled_from([PLAIN, ZSTD])),
        (side, *("view" for _ in views), *"ab"[: len(row_shape)]),
    )
    raw = np.random.default_rng(draw(st.integers(0, 9))).bytes(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize)
    return plan, spec, np.frombuffer(raw, spec.dtype).reshape(spec.shape)


def write_array(path: Path, plan: Plan, spec: ArraySpec, values: np.ndarray) -> Store:
    with StoreWriter.open(path, plan=plan, arrays=[spec], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                if unit.side == spec.side:
                    attempt.append(spec.name, values[unit.start : unit.stop])
                if unit.side == "image":
                    attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})
    return open_store(path)


def chains(rank: int) -> list[list[Any] | None]:
    """Inner codecs that zarr-python writes instead of us (None: our own)."""
    bytes_ = BytesCodec()
    compressed = [[bytes_, BloscCodec(cname="lz4", shuffle="shuffle")], [bytes_, ZstdCodec(level=3, checksum=True)], [bytes_, GzipCodec()]]
    return [None, None, *compressed, [TransposeCodec(order=tuple(reversed(range(rank)))), BytesCodec(endian="big"), BloscCodec()]]


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts(), st.data())
def test_gather_is_numpy_and_zarr_for_any_layout(tmp_path: Path, layout: tuple[Plan, ArraySpec, np.ndarray], data: st.DataObject) -> None:
    plan, spec, values = layout
    num_rows = spec.shape[0]
    rows = np.array(data.draw(st.lists(st.integers(-num_rows, num_rows - 1), max_size=50)), np.int64)
    views = np.array(data.draw(st.lists(st.integers(-spec.views, spec.views - 1), min_size=len(rows), max_size=len(rows))), np.int64)
    codecs = data.draw(st.sampled_from(chains(len(spec.shape))))
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        store = write_array(Path(folder) / "store", plan, spec, values)
        if codecs is not None:
            rewrite_with_zarr(store.path, spec, values, codecs)
            store = open_store(store.path)
        assert store.arrays[spec.name].shape == spec.shape
        array = zarr.open_array(store.path / spec.name, mode="r")
        if spec.has_views:
            expected = array.oindex[rows, :].reshape(len(rows), *spec.shape[1:])
            assert store.gather(spec.name, rows, views).tobytes() == expected[np.arange(len(rows)), views].tobytes() == values[rows, views].tobytes()
            assert store.gather(spec.name, rows).tobytes() == expected[:, 0].tobytes()
            assert store.gather(spec.name, rows, spec.views - 1).tobytes() == expected[:, -1].tobytes()
        else:
            assert store.gather(spec.name, rows).tobytes() == array.oindex[rows].tobytes() == values[rows].tobytes()
        again = store.gather(spec.name, rows)
        assert again.dtype == spec.dtype
        assert again.shape == (len(rows), *spec.row_shape)


@pytest.fixture
def store(pristine: Path) -> Store:
    return open_store(pristine)


def test_a_batch_goes_into_the_buffer_that_is_given(store: Store, sample: Any) -> None:
    out = np.empty((4, 6), "float16")
    assert store.gather("image/embedding", [3, 3, -1, 0], [1, 0, 1, 0], out=out) is out
    assert np.array_equal(out, sample.arrays["image/embedding"][[3, 3, -1, 0], [1, 0, 1, 0]])
    read_only = np.empty((4, 6), "float16")
    read_only.flags.writeable = False
    for wrong in (np.empty((3, 6), "float16"), np.empty((4, 6), "float32"), np.empty((6, 4), "float16").T, read_only):
        with pytest.raises(ValueError, match="out must be"):
            store.gather("image/embedding", [0, 1, 2, 3], out=wrong)


@pytest.mark.parametrize("rows", [[45], [-46], [0.5], [[0]], 3, [True]])
def test_rows_that_do_not_exist_are_an_index_error(store: Store, rows: Any) -> None:
    with pytest.raises(IndexError):
        store.gather("image/embedding", rows)
    with pytest.raises(IndexError, match="view 2 is out of bounds for 2 views"):
        store.gather("image/embedding", [0], [2])
    with pytest.raises(ValueError, match="has no views"):
        store.gather("text/embedding", [0], [0])


def test_an_array_that_is_not_there_is_named_with_those_that_are(store: Store) -> None:
    with pytest.raises(MissingFeature, match="holds no text/tokens; it holds image/embedding, image/tokens"):
        store.gather("text/tokens", [0])


def test_keys_captions_and_offsets_come_back(store: Store, sample: Any) -> None:
    assert store.keys().tolist() == [key for key, _ in sample.rows]
    assert store.captions() == [caption.text for _, captions in sample.rows for caption in captions]
    assert np.array_equal(store.offsets, sample.plan.offsets)
    assert store.image_sha256().tolist() == [sample.index_row(i)["sha256"] for i in range(45)]
    assert np.flatnonzero(~store.image_valid).tolist() == [20]
    assert store.text_valid.all()
    assert store.identity == sample.identity
    assert store.fingerprint == sample.plan.fingerprint


def _matches(store: Store, sample: Any, seed: int) -> bool:
    rows = np.random.default_rng(seed).integers(-45, 45, 200)
    texts = rows % store.num_texts
    return all(
        store.gather(name, index).tobytes() == expected.tobytes()
        for name, index, expected in (
            ("image/embedding", rows, sample.arrays["image/embedding"][rows, 0]),
            ("image/tokens", rows, sample.arrays["image/tokens"][rows, 0]),
            ("text/embedding", texts, sample.arrays["text/embedding"][texts]),
        )
    )


def test_threads_share_a_store(store: Store, sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "THREAD_BYTES", 64)  # batches are split as large ones are
    monkeypatch.setattr(gathering, "OPEN_SHARDS", 2)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda seed: _matches(store, sample, seed), range(64)))


def test_a_forked_process_goes_on_reading(store: Store, sample: Any, monkeypatch: pytest.MonkeyPatch, in_child: Callable[[Callable[[], None]], int]) -> None:
    def read() -> None:
        assert _matches(store, sample, 1)

    monkeypatch.setattr(gathering, "THREAD_BYTES", 64)
    assert _matches(store, sample, 0)
    with gathering._opening:  # as if another thread were opening a shard at the moment of the fork
        assert in_child(read) == 0


def test_a_store_travels_to_another_process_as_its_path_and_digest(store: Store, sample: Any, copied: Path) -> None:
    pickled = pickle.dumps(open_store(copied))
    assert pickle.loads(pickled).digest == store.digest
    shutil.rmtree(copied)
    sample.of_images(20).write(copied)
    with pytest.raises(StoreError, match="another store took its place"):
        pickle.loads(pickled)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(store.gather, ("image/embedding", [3, 4])), sample.arrays["image/embedding"][[3, 4], 0])


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is mapped")
@given(st.lists(st.tuples(st.integers(-41, 41), st.integers(-3, 3)), max_size=30))
def test_the_compiled_copy_is_numpy_and_stops_at_what_was_not_checked(pairs: list[tuple[int, int]]) -> None:
    memory = np.random.default_rng(0).integers(0, 256, (10, 2, 4, 9), dtype=np.uint8)  # chunks of 4 rows of 2 views, in shards of 8 rows
    addresses = np.uint64(memory.ctypes.data) + np.arange(20, dtype=np.uint64) * np.uint64(36)
    addresses[13] = 0  # not yet checked
    ends = np.uint64(memory.ctypes.data) + np.arange(1, 6, dtype=np.uint64) * np.uint64(144) - np.uint64(4)
    seals = memory.reshape(5, 144)[:, -4:].copy().view("<u4")[:, 0].astype(np.uint64)
    seals[4] += 1  # cut
    rows, views = np.array(pairs, np.int64).reshape(-1, 2).T.copy()
    out = np.zeros((len(rows), 9), np.uint8)
    status = copy_rows(rows, views, addresses, ends, seals, 40, 2, 2, 3, out)
    if not all(-40 <= row < 40 and -2 <= view < 2 and (row % 40 // 4, view % 2) != (6, 1) for row, view in pairs):
        assert status == UNKNOWN
    elif any(row % 40 // 8 == 4 for row, _ in pairs):
        assert status == 4
    else:
        assert status == COPIED
        assert np.array_equal(out, memory.transpose(0, 2, 1, 3).reshape(40, 2, 9)[rows, views])


def test_the_same_is_read_where_mapping_is_not_safe(pristine: Path, sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "CAN_MAP", False)
    assert all(_matches(open_store(pristine), sample, seed) for seed in range(3))


CHAINS = {
    "blosc": [BytesCodec(), BloscCodec(cname="zstd", shuffle="bitshuffle")],
    "blosc-lz4": [BytesCodec(), BloscCodec(cname="lz4", shuffle="shuffle")],
    "zstd-with-checksum": [BytesCodec(), ZstdCodec(level=3, checksum=True)],
    "gzip": [BytesCodec(), GzipCodec()],
    "big-endian": [BytesCodec(endian="big")],
    "transpose-blosc": [TransposeCodec(order=(1, 0)), BytesCodec(endian="big"), BloscCodec()],
}


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize(
    ("chain", "name"), [*itertools.product(["blosc", "gzip"], ["image/embedding", "text/length"]), *((chain, "text/embedding") for chain in CHAINS)]
)
def test_every_chain_of_zarrs_core_is_checked_and_read(copied: Path, sample: Any, name: str, chain: str) -> None:
    spec = next(spec for spec in sample.specs if spec.name == name)
    rewrite_with_zarr(copied, spec, sample.arrays[name], CHAINS[chain])
    store = open_store(copied)
    rows = np.array([44, 3, 3, -1, 0])
    expected = sample.arrays[name][rows, [1, 0, 1, 1, 0]] if spec.has_views else sample.arrays[name][rows]
    assert store.gather(name, rows, [1, 0, 1, 1, 0] if spec.has_views else None).tobytes() == expected.tobytes()
    shard = copied / spec.shard_path(0)
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    rows, views = np.mgrid[: spec.shape[0], : spec.views].reshape(2, -1)
    with pytest.raises(DamagedStore, match="does not match its crc32c"):
        open_store(copied).gather(name, rows, views if spec.has_views else None)


@pytest.mark.parametrize(
    ("codec", "payload"),
    [
        ("blosc", numcodecs.blosc.compress(bytes(1 << 24), b"zstd", 5, 1)),
        ("blosc", numcodecs.blosc.compress(bytes(48), b"zstd", 5, 1) + b"\0"),
        ("blosc", b"\2\1"),
        ("gzip", gzip.compress(bytes(1 << 24))),
        ("gzip", gzip.compress(bytes(47))),
        ("gzip", gzip.compress(bytes(48)) * 2),
        ("gzip", gzip.compress(bytes(48))[:-1]),
        ("gzip", b"no stream"),
    ],
    ids=["blosc-bomb", "blosc-longer", "blosc-cut", "gzip-bomb", "gzip-short", "gzip-twice", "gzip-cut", "gzip-none"],
)
def test_a_chunk_that_says_it_holds_other_than_its_rows_is_not_decoded(codec: str, payload: bytes) -> None:
    spec = ArraySpec("text/a", (4, 6), "float16", (4, 6), (4, 6), ("bytes", codec, "crc32c"), ("text", "channel"))
    decode = functools.partial(decode_chunk_with_zarr, spec, {}) if codec == "gzip" else functools.partial(decode_chunk, spec)
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not hold 48 bytes"):
        decode(np.frombuffer(payload, np.uint8))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("configuration", [{"order": "C"}, {"order": [0, 0]}, {"order": [0]}, {"order": None}, {}, 7])
def test_a_chain_that_makes_no_sense_does_not_decode(configuration: Any) -> None:
    plain = ArraySpec("text/a", (4, 6), "float16", (4, 6), (4, 6), PLAIN, ("text", "channel"))
    metadata = plain.to_metadata()
    metadata["codecs"][0]["configuration"]["codecs"].insert(0, {"name": "transpose", "configuration": configuration})
    spec = ArraySpec.from_metadata("text/a", metadata)
    with pytest.raises(ValueError):
        decode_chunk_with_zarr(spec, metadata, np.zeros(48, np.uint8))


def rewrite_with_zarr(path: Path, spec: ArraySpec, values: np.ndarray, codecs: list[Any]) -> None:
    """Replace an array by one that zarr-python wrote with other codecs, and the manifest by one that lists it."""
    shutil.rmtree(path / spec.name)
    fill = np.nan if spec.dtype.startswith("float") else 0
    sharding = zarr.codecs.ShardingCodec(chunk_shape=spec.chunk, codecs=[*codecs, Crc32cCodec()])
    array = zarr.create_array(
        path / spec.name, shape=spec.shape, chunks=spec.shard, dtype=spec.dtype, fill_value=fill, serializer=sharding, compressors=None, filters=None,
        dimension_names=spec.dims, config={"write_empty_chunks": True},
    )  # fmt: skip
    array[...] = values
    found = ArraySpec.from_metadata(spec.name, json.loads((path / spec.name / "zarr.json").read_text()))
    crcs = []
    for number in range(found.num_shards):
        shard = (path / found.shard_path(number)).read_bytes()
        start, stop = found.shard_rows(number)
        index = np.frombuffer(shard[-found.chunks_per_shard * 16 - 4 : -4], "<u8").reshape(-1, 2)[: -(-(stop - start) // found.chunk[0]) * found.views]
        crcs += [crc32c(shard[offset : offset + length - 4]) for offset, length in index.tolist()]
    np.save(path / found.checks_path, np.array(crcs, "<u4"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["arrays"][spec.name] = json.loads((path / spec.name / "zarr.json").read_text())
    for name in (found.metadata_path, found.checks_path, *map(found.shard_path, range(found.num_shards))):
        content = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(path / "manifest.json", manifest)


def test_a_path_without_a_store_says_so(tmp_path: Path, sample: Any) -> None:
    with pytest.raises(StoreNotFound, match="There is no store at"):
        open_store(tmp_path / "nothing")
    sample.open(tmp_path / "begun").close()
    with pytest.raises(IncompleteStore, match="extraction has not ended"):
        open_store(tmp_path / "begun")


@pytest.mark.parametrize("threads", [1, 2, 5])
@given(bounds=st.lists(st.integers(0, 200), min_size=2, max_size=30, unique=True).map(sorted))
def test_every_piece_is_taken_once(threads: int, bounds: list[int]) -> None:
    results = gathering._in_pieces(lambda start, stop: (start, stop), bounds, threads)
    assert sorted(results) == list(itertools.pairwise(bounds))


def test_after_a_piece_that_raised_no_other_is_begun_and_nobody_is_at_one() -> None:
    busy, begun = set(), []

    def work(start: int, stop: int) -> None:
        begun.append(start)
        busy.add(start)
        if start == 3:
            raise DamagedStore("row 3")
        threading.Event().wait(0.001)
        busy.discard(start)

    with pytest.raises(DamagedStore, match="row 3"):
        gathering._in_pieces(work, list(range(10_000)), 2)
    assert busy == {3}
    assert len(begun) < 9_999


def test_threads_that_cannot_be_started_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    taken: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(gathering, "_helpers", {})
        patch.setattr(threading.Thread, "start", fail)
        assert gathering._in_pieces(lambda start, stop: start, [0, 1, 2, 3], 2) == [0, 1, 2]
        patch.undo()
        gathering._in_pieces(lambda start, stop: taken.append(start), [5, 6, 7], 2)
    assert sorted(taken) == [5, 6]


def test_a_chunk_that_must_be_decoded_is_so_once_in_order_whatever_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.freeze(((f"{i}", ()) for i in range(256)), unit_rows=256)
    spec = dataclasses.replace(token_array(plan, "image", 4, 8, zstd=True), chunk=(32, 1, 4, 8))
    values = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float16)
    with StoreWriter.open(tmp_path / "s", plan=plan, arrays=[spec], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                attempt.append(spec.name, values)
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * 256)
        writer.finalise({})
    store, decoded, real = open_store(tmp_path / "s"), [], gathering.decode_chunk
    monkeypatch.setattr(gathering, "DECODING_THREAD_BYTES", 64)
    monkeypatch.setattr(gathering, "PIECE_BYTES", 512)
    monkeypatch.setattr(gathering, "decode_chunk", lambda *args: decoded.append(1) or real(*args))
    assert np.array_equal(store.gather("image/tokens", np.arange(256)), values[:, 0])
    assert len(decoded) == 8
