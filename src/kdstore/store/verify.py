"""Checking a store: first its structure, in seconds, then its bytes on all cores, all of them or a random sample.

Structure is what the manifest, the arrays' metadata and the ends of the files say of each other. Of a damaged shard the chunks are
compared with their crc32c, so that the report names the rows and not only the file. A sample takes some chunks of every shard: what
replaces or cuts a file is then found in any sample, and what flips bits with the probability that the share says.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
import re
import secrets
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdstore.errors import CannotRead, ConfigError, DamagedStore, StoreError
from kdstore.progress import OnProgress, silent
from kdstore.store.codecfile import parameter_path, stored_codecs
from kdstore.store.indexfile import check_rows
from kdstore.store.layout import BESIDE, BUILD, MANIFEST, OFFSETS, PART, PLAIN, ArraySpec
from kdstore.store.manifest import NPY_HEADER_BYTES, Manifest, cannot_read, read_manifest
from kdstore.store.plan import SIDES
from kdstore.store.reader import array_spec
from kdstore.store.shard import CRC_BYTES, crc32c, index_bytes, parse_index
from kdstore.threads import available_cores

BUFFER_BYTES = 1 << 20
_SAMPLE = re.compile(r"(\d+(?:\.\d+)?) ?(%|[kMGT]B)")
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written, or cannot be read; `rows` [start, stop) of its side are affected (None: the whole store)."""

    path: str
    rows: tuple[int, int] | None
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_store` found; files that are there by the manifest, their bytes and how many of these were read; findings in order of their path.

    `seed` is that of the sample, None if all was to be read. `absent` counts the files that a part leaves out.
    """

    path: Path
    digest: str
    num_files: int
    num_bytes: int
    read_bytes: int
    seed: int | None
    damaged: tuple[Damage, ...]
    unreadable: tuple[Damage, ...]
    absent: int = 0

    @property
    def ok(self) -> bool:
        return not self.damaged and not self.unreadable


@dataclass(frozen=True)
class _Shard:
    """Shard `number` of an array."""

    spec: ArraySpec
    number: int

    @property
    def first_chunk(self) -> int:
        return self.number * self.spec.chunks_per_shard

    @property
    def num_chunks(self) -> int:
        """Its chunks that hold rows."""
        return min(self.spec.chunks_per_shard, self.spec.num_chunks - self.first_chunk)


@dataclass(frozen=True)
class _Listing:
    """What the manifest's files must be, by its arrays: shards, .npy files as (numbers, dtype), and where they contradict each other."""

    shards: dict[str, _Shard]
    numbers: dict[str, tuple[int, str]]
    damaged: list[Damage]


def verify_store(path: str | Path, *, sample: str | None = None, seed: int | None = None, on_progress: OnProgress = silent) -> VerifyReport:
    """Check the structure of a store, then its bytes, and report files that are missing, changed, no regular files, or not in the manifest.

    `sample` ("5%", "20GB") reads about as many bytes: all metadata, checks and offsets, and of shards and index files a random choice by
    `seed`, at least a chunk of every shard. Raises StoreNotFound, IncompleteStore, CannotRead, ConfigError for a sample that is none, and
    DamagedStore if the manifest itself does not match its digest.
    """
    asked = None if sample is None else parse_sample(sample)
    manifest = read_manifest(Path(path))
    listing = _listing(manifest)
    held = manifest.held
    total = sum(entry.size for entry in held.values())
    if asked is not None and seed is None:
        seed = secrets.randbits(32)
    chosen = {} if asked is None or seed is None else _choice(manifest, listing.shards, asked(total), seed)
    damaged, unreadable = list(listing.damaged), list[Damage]()

    def run(work: Callable[[str], list[Damage]], names: list[str]) -> None:
        with _threads() as pool:
            for bad, unread in pool.map(functools.partial(_judged, manifest, work), names):
                damaged.extend(bad)
                unreadable.extend(unread)

    def sound() -> list[str]:
        """Largest files first, so that no core ends long after the others."""
        found = {damage.path for damage in (*damaged, *unreadable)}
        return sorted((name for name in held if name not in found), key=lambda name: -held[name].size)

    names = sound()
    advance, _ = _counter(on_progress, "structure", len(names))
    run(lambda name: _check_structure(manifest, listing, name, advance), names)
    names = sound()
    advance, done = _counter(on_progress, "bytes", sum(_planned_bytes(manifest, listing.shards, name, chosen.get(name)) for name in names))
    load_checks = functools.cache(functools.partial(_load_checks, manifest))
    run(lambda name: _check_bytes(manifest, listing.shards.get(name), name, chosen.get(name), load_checks, advance), names)
    bad, unread = (tuple(sorted(found, key=lambda damage: (damage.path, damage.rows or ()))) for found in (damaged, unreadable))
    absent = len(manifest.files) - len(held)
    return VerifyReport(manifest.root, manifest.digest, len(held), total, done(), seed if sample else None, bad, unread, absent)


def parse_sample(text: str) -> Callable[[int], float]:
    """Read "5%" or "20GB" as a function from the bytes of a store to the bytes to read; raises ConfigError."""
    match = _SAMPLE.fullmatch(text.strip())
    if not match or float(match[1]) == 0 or (match[2] == "%" and float(match[1]) > 100):
        raise ConfigError(f"'{text}' is no sample.", "Give a share such as 5% (100% at most), or an amount such as 20GB (kB, MB, GB, TB).")
    number, unit = float(match[1]), match[2]
    return lambda total: total * number / 100 if unit == "%" else number * _UNITS[unit]


def _listing(manifest: Manifest) -> _Listing:
    """Compare the manifest's files with its arrays and with what lies in the folder; reads the arrays' metadata only."""
    plan, files = manifest.content["plan"], manifest.files
    shards, specs, numbers = dict[str, _Shard](), dict[str, ArraySpec](), {OFFSETS: (plan["images"] + 1, "<i8")}
    damaged = [Damage(extra, None, "is not in the manifest") for extra in _files_beyond(manifest)]
    expected: dict[str, tuple[int, int] | None] = {"zarr.json": None, OFFSETS: None}
    for name in manifest.content["arrays"]:
        try:
            spec = array_spec(manifest, name)
        except CannotRead:
            continue  # is found again when the file itself is opened
        except StoreError as e:
            damaged.append(Damage(f"{name}/zarr.json", None, e.message))
            continue
        specs[name] = spec
        numbers[spec.checks_path] = (spec.num_chunks, "<u4")
        shards |= {spec.shard_path(number): _Shard(spec, number) for number in range(spec.num_shards)}
        expected |= {spec.checks_path: None, f"{name.rpartition('/')[0]}/zarr.json".lstrip("/"): None}
    try:
        for coded in stored_codecs(manifest, specs).values():
            numbers |= {parameter_path(coded.name, p): (math.prod(shape), "<f4") for p, shape in coded.chain.parameters(coded.row_shape).items()}
    except CannotRead:
        pass
    except StoreError as e:
        damaged.append(Damage("codecs", None, e.message))
    expected |= {path: shard.spec.shard_rows(shard.number) for path, shard in shards.items()}
    for side in SIDES:
        for number, start in enumerate(range(0, plan[f"{side}s"], plan["unit_rows"])):
            expected[f"index/{side}/{number:05d}.parquet"] = (start, min(start + plan["unit_rows"], plan[f"{side}s"]))
    for path, rows in expected.items():
        if path not in files:
            damaged.append(Damage(path, rows, "is not listed in the manifest"))
        elif files[path].rows != rows:
            damaged.append(Damage(path, rows, f"is listed with the rows {files[path].rows}"))
    return _Listing(shards, numbers, damaged)


def _files_beyond(manifest: Manifest) -> list[str]:
    """Return the files in the folder that the manifest does not list and that are not ours beside it."""
    found = []
    for folder, folders, names in os.walk(manifest.root):
        relative = Path(folder).relative_to(manifest.root)
        if relative == Path():
            folders[:] = [name for name in folders if name != BUILD]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [(relative / name).as_posix() for name in names + links]
    return [name for name in found if name not in manifest.files and name not in (MANIFEST, PART, *BESIDE)]


def _choice(manifest: Manifest, shards: dict[str, _Shard], asked: float, seed: int) -> dict[str, Int64]:
    """Choose about `asked` bytes: places of chunks in the shards (at least one), and no places for an index file that is left out.

    What is not in the result is read whole. The choice in a file depends on its name and the seed alone.
    """
    held = manifest.held
    optional = {name: entry.size for name, entry in held.items() if name in shards or name.endswith(".parquet")}
    always = sum(entry.size for entry in held.values()) - sum(optional.values())
    share = max(0.0, asked - always) / max(1, sum(optional.values()))
    chosen: dict[str, Int64] = {}
    for name in optional:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        number = shards[name].num_chunks if name in shards else 1
        count = int(number * share + rng.random())
        if name in shards:
            count = max(1, count)
        if count < number:
            chosen[name] = np.sort(rng.choice(number, count, replace=False))
    return chosen


def _planned_bytes(manifest: Manifest, shards: dict[str, _Shard], name: str, places: Int64 | None) -> int:
    size = manifest.files[name].size
    return size if places is None else size * len(places) // shards[name].num_chunks if name in shards else 0


def _check_structure(manifest: Manifest, listing: _Listing, name: str, advance: Callable[[int], None]) -> list[Damage]:
    """Look at the size of a file, at the index of a shard, and at the header of an .npy or the footer of an index file."""
    with manifest.open(name) as fd:
        if name in listing.shards:
            _index(manifest, name, listing.shards[name], fd)
        elif name in listing.numbers:
            manifest.npy_offset(name, os.pread(fd, NPY_HEADER_BYTES, 0), *listing.numbers[name])
        elif name.endswith(".parquet"):
            check_rows(manifest, name, fd)
    advance(1)
    return []


def _check_bytes(
    manifest: Manifest,
    shard: _Shard | None,
    name: str,
    places: Int64 | None,
    load_checks: Callable[[ArraySpec], npt.NDArray[np.uint32] | None],
    advance: Callable[[int], None],
) -> list[Damage]:
    """Compare a file with its sha256, or some chunks of a shard with their crc32c."""
    entry = manifest.files[name]
    with manifest.open(name) as fd:
        if places is not None:
            return _bad_rows(manifest, name, shard, fd, places, load_checks, advance) if shard else []
        sha256 = _sha256(fd, entry.size, advance)
        if sha256 == entry.sha256:
            return []
        rows = _bad_rows(manifest, name, shard, fd, np.arange(shard.num_chunks), load_checks) if shard else []
    return rows or [Damage(name, entry.rows, f"has sha256 {sha256}, expected {entry.sha256}")]


def _sha256(fd: int, size: int, advance: Callable[[int], None]) -> str:
    """Hash a file (hex); hashing and reading let go of the GIL."""
    sha256, buffer, left = hashlib.sha256(), memoryview(bytearray(min(size, BUFFER_BYTES))), size
    while left and (read := os.readv(fd, [buffer])):
        sha256.update(buffer[:read])
        left -= min(read, left)
        advance(read)
    return sha256.hexdigest()


def _bad_rows(
    manifest: Manifest,
    name: str,
    shard: _Shard,
    fd: int,
    places: Int64,
    load_checks: Callable[[ArraySpec], npt.NDArray[np.uint32] | None],
    advance: Callable[[int], None] = lambda read: None,
) -> list[Damage]:
    """Return the ranges of rows whose chunks at some places of a shard do not match their crc32c."""
    spec, index, bad = shard.spec, _index(manifest, name, shard, fd), []
    checks = load_checks(spec)
    for place in places.tolist():
        offset, length = index[place].tolist()
        content = os.pread(fd, length, offset)
        advance(len(content))
        trailer = int.from_bytes(content[-CRC_BYTES:], "little")
        expected = trailer if checks is None else checks[shard.first_chunk + place]
        if len(content) < length or crc32c(content[:-CRC_BYTES]) != expected or trailer != expected:
            bad.append((shard.first_chunk + place) // spec.views)
    return [Damage(name, rows, "does not match the crc32c of these rows") for rows in _ranges(sorted(set(bad)), spec)]


def _load_checks(manifest: Manifest, spec: ArraySpec) -> npt.NDArray[np.uint32] | None:
    """Return the crc32c expected of an array's chunks; None if that file is no good, which is found on its own, and then the trailers must do."""
    try:
        return manifest.load(spec.checks_path, spec.num_chunks, "<u4")
    except StoreError:
        return None


def _ranges(groups: list[int], spec: ArraySpec) -> Iterator[tuple[int, int]]:
    """Join neighbouring groups of a chunk's rows to ranges of rows."""
    for _, run in itertools.groupby(enumerate(groups), lambda item: item[1] - item[0]):
        numbers = [number for _, number in run]
        yield numbers[0] * spec.chunk[0], min((numbers[-1] + 1) * spec.chunk[0], spec.shape[0])


def _index(manifest: Manifest, name: str, shard: _Shard, fd: int) -> Int64:
    """Read the index of a shard; raises DamagedStore."""
    spec, entry, where = shard.spec, manifest.files[name], manifest.root / name
    size = index_bytes(spec)
    if entry.size < size or (spec.codecs == PLAIN and entry.size != spec.plain_shard_bytes(shard.number)):
        raise DamagedStore(f"{where} is listed with {entry.size} bytes, which its shape does not allow{entry.said()}.")
    return parse_index(spec, shard.number, os.pread(fd, size, entry.size - size), entry.size, str(where))


def _judged(manifest: Manifest, work: Callable[[str], list[Damage]], name: str) -> tuple[list[Damage], list[Damage]]:
    """Return what work on a file finds damaged, and the file if it cannot be read."""
    rows = manifest.files[name].rows
    try:
        return work(name), []
    except CannotRead as e:
        return [], [Damage(name, rows, _reason(manifest, name, e))]
    except DamagedStore as e:
        return [Damage(name, rows, _reason(manifest, name, e))], []
    except OSError as e:
        return [], [Damage(name, rows, _reason(manifest, name, cannot_read(e, manifest.root / name)))]


def _reason(manifest: Manifest, name: str, error: StoreError) -> str:
    """Return the message of an error about a file without path and rows, which a finding says itself."""
    message = error.message.replace(manifest.files[name].said(), "").removeprefix("Cannot read ")
    return message.removeprefix(str(manifest.root / name)).lstrip(": ").rstrip(".")


def _counter(on_progress: OnProgress, stage: str, total: int) -> tuple[Callable[[int], None], Callable[[], int]]:
    """Return a function that adds to what is done, for many threads, and reports every thousandth of `total`; and one that tells the sum."""
    lock, done, step = threading.Lock(), 0, max(1, total // 1000)

    def advance(more: int) -> None:
        nonlocal done
        with lock:
            before, done = done, done + more
            if before // step != done // step:
                on_progress(stage, min(done, total), total, "")

    return advance, lambda: done


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """All cores; an interrupt leaves out what has not begun."""
    pool = ThreadPoolExecutor(available_cores(), "verify")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
