"""A store from a stranger: whatever it declares is refused in one line before memory is spent on it, and nothing of it makes us wait."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numcodecs import blosc
from numcodecs.zstd import Zstd

from kdstore.errors import DamagedStore, StoreError
from kdstore.jsonfile import read_json, write_json
from kdstore.store import open_store, verify_store
from kdstore.store.shard import crc32c

InChild = Callable[[Callable[[], None]], int]
GiB = 1 << 30
ALLOWED = 1 << 28  # address space beyond what the process has: every bomb below is larger
TEXTS = "index/text/00000.parquet"  # rows 0 to 16
SHARD = "image/tokens/c/0/0/0/0"  # rows 0 to 4, a chunk each of 60 bytes and 4


def forge(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a manifest that proves itself and lies."""
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    write_json(store / "manifest.json", manifest)


def put(store: Path, contents: dict[str, bytes], change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Replace files, and what the manifest says of them."""

    def list_them(manifest: dict[str, Any]) -> None:
        for name, content in contents.items():
            entry = manifest["files"].setdefault(name, {})
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        change(manifest)

    for name, content in contents.items():
        (store / name).write_bytes(content)
    forge(store, list_them)


def put_array(store: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what `zarr.json` and the manifest say of an array."""
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest["arrays"][name])
    put(store, {f"{name}/zarr.json": json.dumps(manifest["arrays"][name]).encode()}, lambda found: found.update(arrays=manifest["arrays"]))


def read_everything(path: Path) -> None:
    store = open_store(path)
    for name, spec in store.arrays.items():
        store.gather(name, np.arange(spec.shape[0]))
    store.keys(), store.captions(), store.summary(), len(store.offsets)


def verify_whole(path: Path) -> None:
    """Verify, and raise as a reader does if something is damaged."""
    if damaged := verify_store(path).damaged:
        raise DamagedStore(damaged[0].reason)


READERS = (read_everything, verify_whole)


def _error_of(reader: Callable[[Path], None], path: Path) -> Exception | None:
    try:
        reader(path)
    except Exception as e:
        return e
    return None


@pytest.fixture
def refused(in_child: InChild) -> Callable[..., None]:
    """Check that reading is refused in one line, with little memory and in little time."""

    def check(path: Path, match: str, readers: tuple[Callable[[Path], None], ...] = READERS) -> None:
        def read() -> None:
            os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:2])  # a thread takes address space
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWED, used + ALLOWED))
            for reader in readers:
                error = _error_of(reader, path)
                traceback.print_exception(error)  # shown if the test fails
                assert isinstance(error, StoreError), error
                assert re.search(match, str(error)), error
                assert len(str(error).splitlines()) == 1
                assert len(str(error)) < 1000

        assert in_child(read) == 0

    return check


@pytest.fixture(scope="module", autouse=True)
def _warm(pristine: Path) -> None:
    read_everything(pristine)
    verify_whole(pristine)


OUTSIDE = ["../outside", "/etc/passwd", "a/../b", "a//b", "./a", ".", "..", "", "a/", "a\\b", "a\0b", "a\nb", "-rf", ".hidden", "a b", "c:a"]
TRICKS = ["manifest.json", "MANIFEST.json", "_build/x", "run.json", "README.md", "Image/embedding/c/0/0/0", "\N{LATIN SMALL LETTER I WITH DIAERESIS}mage"]


@pytest.mark.parametrize("name", [*OUTSIDE, *TRICKS, pytest.param("a" * 100_000 + "/", id="long")])
def test_a_path_that_is_not_plainly_inside_the_store_is_refused(copied: Path, name: str) -> None:
    forge(copied, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    for read in (open_store, verify_store):
        with pytest.raises(DamagedStore, match="is not a path inside a store") as error:
            read(copied)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("number", [2**60, -1, True, 1.0, "16", None, [], pytest.param(10**4000, id="10**4000")])
@pytest.mark.parametrize("field", ["images", "texts", "unit_rows", "size", "start", "stop"])
def test_a_number_that_is_none_is_refused(copied: Path, field: str, number: Any) -> None:

    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["files"][SHARD]
        if field == "size":
            entry["size"] = -number if type(number) is int and number > 0 else number  # any other is compared with the file's
        elif field in ("start", "stop"):
            entry["rows"][field == "stop"] = number
        else:
            manifest["plan"][field] = number

    forge(copied, change)
    for read in (open_store, verify_store):
        with pytest.raises(DamagedStore, match="is not a manifest of format 1") as error:
            read(copied)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata["shape"].__setitem__(0, True),
        lambda metadata: metadata["shape"].__setitem__(0, -45),
        lambda metadata: metadata["shape"].__setitem__(0, 45.0),
        lambda metadata: metadata["shape"].__setitem__(3, 2**62),
        lambda metadata: metadata.update(shape=[45] * 100_000),
        lambda metadata: metadata.update(shape="45"),
        lambda metadata: metadata.update(codecs=[]),
        lambda metadata: metadata.update(codecs=[{"name": "sharding_indexed", "configuration": []}]),
        lambda metadata: metadata.update(chunk_grid=None),
        lambda metadata: metadata.update(data_type=["float16"]),
        lambda metadata: metadata.update(data_type="object"),
        lambda metadata: metadata.update(dimension_names=None),
        lambda metadata: metadata["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 1, 3, 5]),
        lambda metadata: metadata["codecs"][0]["configuration"].update(chunk_shape=[2**40, 1, 3, 5]),
        lambda metadata: metadata["codecs"][0]["configuration"]["codecs"].insert(0, {"name": "numcodecs.pickle"}),
    ],
)
def test_metadata_of_an_array_that_makes_no_sense_is_refused(copied: Path, change: Callable[[dict[str, Any]], Any], refused: Callable[..., None]) -> None:
    put_array(copied, "image/tokens", change)
    refused(copied, "is not an array of format 1|has .* rows, expected 45|not what its shape needs|index|its shape")


def test_a_manifest_of_gigabytes_is_refused_by_its_size(copied: Path, refused: Callable[..., None]) -> None:
    os.truncate(copied / "manifest.json", 8 * GiB)
    refused(copied, "is larger than any manifest")


@pytest.mark.parametrize(
    "content", [b"[" * (1 << 24), b'{"a":' * (1 << 20), b"[" + b"{}," * (1 << 24) + b"{}]", b'{"a":' + b"9" * (1 << 20) + b"}", b"\xff", b"[1]"]
)
def test_a_manifest_that_grows_when_it_is_parsed_is_refused(copied: Path, content: bytes, refused: Callable[..., None]) -> None:
    (copied / "manifest.json").write_bytes(content)
    refused(copied, "is not JSON|is larger than any manifest")


def test_more_arrays_or_shards_than_the_format_has_are_refused(copied: Path, refused: Callable[..., None]) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    array = manifest["arrays"]["image/tokens"]
    forge(copied, lambda found: found["arrays"].update({f"image/x{i}": array for i in range(60)}))
    refused(copied, "more than 64 arrays")


@pytest.mark.parametrize("name", ["image/tokens/zarr.json", "checks/image/tokens.npy", "index/offsets.npy", TEXTS, SHARD])
def test_a_listed_file_of_a_size_that_nothing_needs_is_not_read(copied: Path, name: str, refused: Callable[..., None]) -> None:
    """Sparse files cost nothing to make."""
    os.truncate(copied / name, 64 * GiB)
    forge(copied, lambda manifest: manifest["files"][name].update(size=64 * GiB))
    refused(copied, "bytes, expected|is not a NumPy file|its shape|is not an index file")


def test_links_fifos_sockets_and_folders_are_no_files_of_a_store(copied: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(copied / "image", outside)

    def link_folder(path: Path) -> None:
        shutil.rmtree(copied / "image")
        (copied / "image").symlink_to(outside)

    def listen(path: Path) -> None:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as one:
            folder = os.open(path.parent, os.O_RDONLY)
            one.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)

    def replaced(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def replace(path: Path) -> None:
            path.unlink()
            make(path)

        return replace

    kept = tmp_path / "kept"
    shutil.copytree(copied, kept)
    for make in (replaced(os.mkfifo), replaced(Path.mkdir), replaced(lambda path: path.symlink_to("/dev/zero")), listen, link_folder):
        make(copied / SHARD)
        refused(copied, "is not a regular file|is a link|is not in the manifest")
        shutil.rmtree(copied)
        shutil.copytree(kept, copied)
    for make in (replaced(os.mkfifo), replaced(lambda path: path.symlink_to(kept / "manifest.json")), replaced(lambda path: path.symlink_to("/dev/zero"))):
        make(copied / "manifest.json")
        refused(copied, "is not a regular file")
        shutil.copy(kept / "manifest.json", tmp_path / "manifest.json")
        os.replace(tmp_path / "manifest.json", copied / "manifest.json")
    read_everything(copied)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (7,)


@pytest.mark.parametrize(
    "header", [None, "{'descr': '|O', 'fortran_order': False, 'shape': (46,), }", "-" * 9000 + "1", "(" * 9000, "{'descr': [('a', '|O')], "]
)
def test_a_pickle_in_an_npy_file_is_never_run(copied: Path, header: str | None, refused: Callable[..., None]) -> None:
    sink = io.BytesIO()
    if header is None:
        np.save(sink, np.array([_Payload()] * 46, object), allow_pickle=True)
    else:
        text = header.encode().ljust(118) + b"\n"
        sink.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + pickle.dumps(_Payload()))
    for name in ("index/offsets.npy", "checks/image/embedding.npy"):
        put(copied, {name: sink.getvalue()})
        refused(copied, "is not a NumPy file|bytes, expected")


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"compression": "zstd", "write_statistics": False, **options})
    return sink.getvalue()


def _texts(rows: int, caption: Any) -> pa.Table:
    numbers = np.arange(rows)
    texts = {name: pa.array(["x"] * rows) for name in ("kind", "sha256")}
    return pa.table({"row": numbers, "image_row": numbers, **texts, "caption": caption})


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: _parquet(_texts(16, ["x" * (300 << 20)] + [""] * 15)), id="a page of zeros"),
        pytest.param(lambda: _parquet(_texts(16, ["x" * (300 << 20)] + [""] * 15), compression="gzip", use_dictionary=False), id="a gzip page"),
        pytest.param(lambda: _parquet(_texts(16, ["x" * (15 << 20)] * 16), dictionary_pagesize_limit=64 << 20), id="one text in many rows"),
        pytest.param(lambda: _parquet(_texts(1 << 20, pa.array([""] * (1 << 20)))), id="more rows than the unit"),
        pytest.param(lambda: _parquet(_texts(16, [[["x"] * 9]] * 16)), id="lists"),
        pytest.param(lambda: _parquet(pa.table({"row": np.arange(16)})), id="no such column"),
        pytest.param(lambda: _parquet(_texts(16, np.arange(16))), id="numbers"),
        pytest.param(lambda: _parquet(_texts(16, ["x", None] * 8)), id="no value"),
        pytest.param(lambda: b"PAR1" + b"\x15" * 90 + struct.pack("<I", 80) + b"PAR1", id="a footer of noise"),
        pytest.param(lambda: b"PAR1" + struct.pack("<I", 0xFFFFFFF0) + b"PAR1", id="a footer longer than the file"),
    ],
)
def test_an_index_file_that_bursts_is_refused(copied: Path, content: Callable[[], bytes], refused: Callable[..., None]) -> None:
    put(copied, {TEXTS: content()})
    refused(copied, TEXTS, (read_everything,))


def test_a_page_that_says_more_than_its_footer_is_refused(copied: Path, refused: Callable[..., None]) -> None:
    """The footer says 40 bytes, the page before its content 2 GiB less one."""
    content = bytearray(_parquet(_texts(16, [f"caption {i}" for i in range(16)]), use_dictionary=False))
    chunk = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(0).column(4)
    at = chunk.data_page_offset
    assert content[at : at + 3] == bytes([0x15, 0x00, 0x15])  # type DATA_PAGE, then the decoded size as a varint
    end = at + 3
    while content[end] & 128:
        end += 1
    largest = bytes([0xFE, 0xFF, 0xFF, 0xFF, 0x0F])
    content[at + 3 : end + 1] = largest  # the file grows by some bytes, and what follows shifts with it
    put(copied, {TEXTS: bytes(content)})
    refused(copied, TEXTS, (read_everything,))


def _shard(payloads: list[bytes]) -> bytes:
    """Lay out a shard whose trailers and index are right."""
    body, index = b"", b""
    for payload in payloads:
        index += struct.pack("<QQ", len(body), len(payload) + 4)
        body += payload + struct.pack("<I", crc32c(payload))
    return body + index + struct.pack("<I", crc32c(index))


def _skippable() -> bytes:
    return struct.pack("<II", 0x184D2A50, 60 | 60 << 8) + bytes(60)


CHUNK_BOMBS = {
    "zstd, says more": ("zstd", lambda: Zstd(level=1).encode(bytes(300 << 20))),
    "zstd, says nothing": ("zstd", lambda: b"\x28\xb5\x2f\xfd\x00\x58" + (b"\x02\x00\x10" + b"\0") * 100 + b"\x03\x00\x10\0"),
    "zstd, two frames": ("zstd", lambda: Zstd(level=1).encode(bytes(60)) + Zstd(level=1).encode(bytes(300 << 20))),
    "zstd, frame to be skipped": ("zstd", _skippable),
    "zstd, says less than it holds": ("zstd", lambda: b"\x28\xb5\x2f\xfd\x20\x3c" + b"\x02\x00\x10\0" * 50 + b"\x03\x00\x10\0"),
    "blosc, says more": ("blosc", lambda: blosc.compress(bytes(300 << 20), b"zstd", 1)),
    "blosc, says less than it holds": ("blosc", lambda: (lambda c: c[:4] + struct.pack("<I", 60) + c[8:])(blosc.compress(bytes(1 << 22), b"zstd", 1))),
    "gzip": ("gzip", lambda: __import__("gzip").compress(bytes(300 << 20))),
}


@pytest.mark.parametrize(("codec", "payload"), CHUNK_BOMBS.values(), ids=CHUNK_BOMBS.keys())
def test_a_compressed_chunk_that_bursts_is_refused(copied: Path, codec: str, payload: Callable[[], bytes], refused: Callable[..., None]) -> None:
    configuration = {
        "zstd": {"level": 1, "checksum": False},
        "blosc": {"cname": "zstd", "clevel": 1, "shuffle": "noshuffle", "typesize": 4, "blocksize": 0},
        "gzip": {"level": 1},
    }[codec]
    put_array(
        copied,
        "image/tokens",
        lambda metadata: metadata["codecs"][0]["configuration"]["codecs"].insert(1, {"name": codec, "configuration": configuration}),
    )
    content = payload()
    checks = np.load(copied / "checks/image/tokens.npy")
    checks[:4] = crc32c(content)
    sink = io.BytesIO()
    np.save(sink, checks)
    put(copied, {SHARD: _shard([content] * 4), "checks/image/tokens.npy": sink.getvalue()})
    refused(copied, "does not decode|missing or lies outside", (lambda path: open_store(path).gather("image/tokens", [0]),))


@pytest.mark.parametrize("extent", [(0, 2**63), (2**64 - 64, 128), (2**40, 64), (0, 3), (0, 2**64 - 1)])
def test_an_index_that_points_outside_its_shard_is_refused(copied: Path, extent: tuple[int, int], refused: Callable[..., None]) -> None:
    content = (copied / SHARD).read_bytes()
    index = struct.pack("<QQ", *extent) + content[-3 * 16 - 4 : -4]
    put(copied, {SHARD: content[: -4 * 16 - 4] + index + struct.pack("<I", crc32c(index))})
    refused(copied, "is missing or lies outside the file")


def test_a_compressed_chunk_as_long_as_a_sparse_shard_is_not_read(copied: Path, refused: Callable[..., None]) -> None:
    put_array(
        copied,
        "image/tokens",
        lambda metadata: metadata["codecs"][0]["configuration"]["codecs"].insert(1, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}),
    )
    index = struct.pack("<QQ", 0, 32 * GiB) * 4
    with open(copied / SHARD, "wb") as f:
        f.truncate(32 * GiB)
        f.seek(32 * GiB)
        f.write(index + struct.pack("<I", crc32c(index)))
        size = f.tell()
    forge(copied, lambda manifest: manifest["files"][SHARD].update(size=size))
    refused(copied, "missing or lies outside")


def test_a_file_beside_the_store_that_is_no_record_is_refused(copied: Path) -> None:
    os.truncate(copied / "run.json", 8 * GiB)
    with pytest.raises(DamagedStore, match=r"run.json is larger than any JSON"):
        read_json(copied / "run.json")


@pytest.mark.parametrize(("place", "number"), [(0, 1), (-1, 2**60), (7, -5), (7, 2**62)])
def test_offsets_that_lead_outside_are_refused(copied: Path, place: int, number: int) -> None:
    offsets = np.load(copied / "index/offsets.npy")
    offsets[place] = number
    sink = io.BytesIO()
    np.save(sink, offsets)
    put(copied, {"index/offsets.npy": sink.getvalue()})
    with pytest.raises(DamagedStore, match="does not ascend from 0 to 66"):
        read_everything(copied)
