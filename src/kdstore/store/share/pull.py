"""Pulling a store, or a part of one, from a place that is not trusted.

Nothing is believed but the manifest's digest, which `expect` pins: its paths and sizes are checked before anything is written, every file is hashed as it
comes, and the manifest is put beside the files last.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdstore.address import is_address, redacted
from kdstore.errors import ConfigError, DamagedStore, IdentityMismatch, KdstoreError, SignatureError, StoreError, StoreNotFound, TransferError
from kdstore.jsonfile import differing_fields, disk_errors, make_folders, parse_json, write_bytes
from kdstore.progress import OnProgress, silent
from kdstore.store.layout import BESIDE, BUILD, MANIFEST, SIGNATURE
from kdstore.store.lock import Lock, take_lock
from kdstore.store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest, read_manifest
from kdstore.store.reader import Store
from kdstore.store.share.choice import Choice, chosen_files, frame_files, specs_of
from kdstore.store.share.fetch import Transfer, fetch_files, read_small
from kdstore.store.share.places import open_place
from kdstore.store.share.staging import Staging, bytes_of, check_space, read_replaced
from kdstore.store.share.transport import Failure, Patience, Place
from kdstore.store.signing import MAX_SIGNATURE_BYTES, check_signature
from kdstore.store.withdraw import is_successor
from kdstore.store.writer import BUILD_JSON, check_place

MAX_BESIDE_BYTES = 1 << 24  # of a file beside the manifest, which nothing vouches for
DIGEST = re.compile("sha256:[0-9a-f]{64}")
_MIRROR = re.compile(r"https?://[\w.-]+(:\d+)?(/[\w./~-]*)?|hf://datasets/[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Pulled:
    """What a pull brought: files and bytes chosen, of how many in the store; those that were there already, and bytes that came."""

    path: str
    source: str
    digest: str
    files: int
    of_files: int
    bytes: int
    of_bytes: int
    kept_files: int
    kept_bytes: int
    received_bytes: int
    whole: bool
    dry_run: bool = False


def pull_store(
    source: str,
    target: str | Path,
    *,
    choice: Choice | None = None,
    expect: str | None = None,
    signed_by: str | Path | None = None,
    mirrors: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    parallel: int = 8,
    patience: Patience | None = None,
    on_progress: OnProgress = silent,
) -> Pulled:
    """Bring a store or a part of one into a folder; run again to go on, to complete a part, or to replace damaged files.

    `expect` is the digest that it must have, `signed_by` a list of allowed signers of whom one must have signed it. Files that `source` does not have as they
    should be are taken from `mirrors`, then from those that the store's card lists. `dry_run` writes nothing. A store of another identity is replaced with
    `force` only. Raises StoreNotFound, DamagedStore for a manifest that is none, IdentityMismatch, SignatureError, TransferError, StoreLocked, DiskFull,
    CannotWrite, and what a choice raises.
    """
    choice, patience = choice or Choice(), patience or Patience()
    if is_address(str(target)):
        raise ConfigError(f"{redacted(str(target))} is no folder.", "Pull into a folder; to send a store elsewhere: kdstore store push.")
    transfer = Transfer([open_place(name, patience) for name in (source, *mirrors)], patience)
    if expect is not None and not DIGEST.fullmatch(expect):
        raise ConfigError(f"'{expect}' is no digest.", "Write --expect sha256: and 64 hex digits, as 'kdstore store info' shows them.")
    encoded, manifest = read_remote_manifest(transfer, expect)
    signature = None if signed_by is None else _remote_signature(transfer, manifest.digest, signed_by)
    card = read_card(transfer)
    transfer.places += [open_place(name, patience) for name in mirrors_of(card)]
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            return _would_pull(transfer, Path(target), Staging(Path(scratch), manifest, encoded), choice, parallel, on_progress)
    target = Path(target)
    check_place(target)
    check_old(str(target), _old_manifest(target, force), manifest, force)
    least = set(manifest.files) if choice == Choice() else frame_files(manifest, specs_of(manifest))
    check_space(target, bytes_of(manifest.files, least - Staging(target, manifest, encoded).sized(least)))
    with _locked(target, on_progress) as lock, disk_errors(target):
        old = _old_manifest(target, force)
        check_old(str(target), old, manifest, force)
        staging = Staging(target, replace(manifest, root=target), encoded)
        staging.begin()
        files, kept = _choose_and_fetch(transfer, staging, choice, parallel, on_progress)
        there = {SIGNATURE: signature, "README.md": card}
        fetch_beside(transfer, staging.folder, {name: there.get(name) for name in BESIDE}, on_progress)
        with lock.held():
            made = staging.commit(files, old, transfer.places[0].name)
    return _pulled(target, transfer, manifest, files, kept, whole=made.part is None)


def read_remote_manifest(transfer: Transfer, expect: str | None = None) -> tuple[bytes, Manifest]:
    """Return the manifest of the first place that has one, of the digest `expect` if that is given; raises StoreNotFound, IdentityMismatch, TransferError."""
    refusals: list[KdstoreError] = []
    for place in transfer.places:
        try:
            encoded = read_small(transfer, place, MANIFEST, MAX_MANIFEST_BYTES)
            manifest = parse_manifest(encoded, Path(MANIFEST))
            if expect in (None, manifest.digest):
                return encoded, manifest
            hint = "Ask its publisher which digest is right; without --expect what is there is pulled."
            refusals.append(IdentityMismatch(f"{place.name} has the store {manifest.digest}, expected {expect}.", hint))
        except Failure as e:
            kind = StoreNotFound if e.missing else TransferError
            refusals.append(kind(f"There is no store at {place.name}: {MANIFEST} {e.reason}.", "Check the place, and your rights there."))
        except StoreError as e:
            refusals.append(DamagedStore(f"{place.name} has no manifest that can be read: {e.message}", "Name another place, or tell its publisher."))
    raise refusals[0]


def _remote_signature(transfer: Transfer, digest: str, signed_by: str | Path) -> bytes:
    """Return the signature of a digest by an allowed signer from the first place that has one; raises SignatureError, ConfigError."""
    refusals = []
    for place in transfer.places:
        try:
            signature = read_small(transfer, place, SIGNATURE, MAX_SIGNATURE_BYTES)
            check_signature(digest, signature, signed_by)
            return signature
        except Failure as e:
            hint = "Ask its publisher for one: kdstore store sign."
            refusals.append(SignatureError(f"{place.name} is not shown to be signed: {SIGNATURE} {e.reason}.", hint))
        except SignatureError as e:
            refusals.append(e)
    raise refusals[0]


def read_card(transfer: Transfer) -> bytes | None:
    """Return the README.md of the first place, b'' if there is none; None if it does not come."""
    try:
        return read_small(transfer, transfer.places[0], "README.md", MAX_BESIDE_BYTES)
    except Failure as e:
        return b"" if e.missing else None


def mirrors_of(card: bytes | None) -> list[str]:
    """Return the `mirrors` of a card's YAML, those of the web and the Hub: nobody vouches for them, so none gets credentials of ours or reads our disk."""
    import yaml

    with contextlib.suppress(UnicodeDecodeError, RecursionError, yaml.YAMLError):
        block = re.match(r"---\n(.{,65536}?)\n---\n", (card or b"").decode(), re.DOTALL)
        said = yaml.load(block[1], yaml.BaseLoader) if block else None  # texts alone: the safe loader unfolds keys that are merged, to any size
        named = said.get("mirrors") if isinstance(said, dict) else None
        return [name for name in named[:8] if isinstance(name, str) and _MIRROR.fullmatch(name)] if isinstance(named, list) else []
    return []


def _old_manifest(target: Path, force: bool) -> Manifest | None:
    """Return the manifest of the store at the target, or of one that an interrupted pull had begun to replace; a damaged one is none if that is forced."""
    try:
        return read_manifest(target) if (target / MANIFEST).is_file() else read_replaced(target)
    except DamagedStore as e:
        if force:
            return None
        raise DamagedStore(e.message, "Pull it anew, with all of its files: --force.") from e


def check_old(where: str, old: Manifest | None, new: Manifest, force: bool) -> None:
    """Raise IdentityMismatch unless the new store may take the place of the old one: the same features, or a version with rows withdrawn."""
    if old is not None and not force and old.content["identity_digest"] != new.content["identity_digest"] and not is_successor(new, old):
        differs = differing_fields(old.content["identity"], new.content["identity"], ("there", "pulled"))
        raise IdentityMismatch(f"{where} holds other features ({differs}).", "Choose another place, or replace them: --force.")


@contextlib.contextmanager
def _locked(target: Path, on_progress: OnProgress) -> Iterator[Lock]:
    """Be the only one who writes the target; raises StoreLocked, StoreError if an extraction has begun there."""
    lock = None
    with disk_errors(target):
        while lock is None:
            make_folders(target / BUILD)
            with contextlib.suppress(FileNotFoundError):  # another pull ended just now and removed the folder
                lock = take_lock(target / BUILD, on_progress)
    try:
        if (target / BUILD / BUILD_JSON).exists() and not (target / MANIFEST).exists():
            raise StoreError(f"{target} is a store that is being extracted.", "Choose another path.")
        yield lock
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            (target / BUILD).rmdir()


def _choose_and_fetch(transfer: Transfer, staging: Staging, choice: Choice, parallel: int, on_progress: OnProgress) -> tuple[set[str], set[str]]:
    """Fetch what a choice takes and the target lacks; returns the files chosen, and those of them that were there."""
    manifest, files = staging.manifest, staging.manifest.files
    specs, kept = specs_of(manifest), set[str]()
    frame = None
    if not choice.all_rows:
        names = frame_files(manifest, specs)
        kept = staging.found(names, on_progress)
        _fetch(transfer, staging, names - kept, 0, parallel, on_progress)
        frame = Store(staging.show(names, transfer.places[0].name))
    chosen = chosen_files(choice, manifest, specs, frame, on_progress)
    rest = chosen - (frame_files(manifest, specs) if frame else set())
    there = staging.found(rest, on_progress)
    kept |= there
    to_come = _tell(manifest, chosen, rest - there, on_progress)
    _fetch(transfer, staging, rest - there, bytes_of(files, chosen) - to_come, parallel, on_progress)
    return chosen, kept


def _tell(manifest: Manifest, chosen: set[str], missing: set[str], on_progress: OnProgress) -> int:
    """Say how much a pull takes, and return the bytes of what is missing of it."""
    files = manifest.files
    total, of_all, to_come = (bytes_of(files, names) for names in (chosen, files, missing))
    on_progress("notice", 0, 0, f"{len(chosen)} of {len(files)} files, {total / 1e6:,.1f} of {of_all / 1e6:,.1f} MB; {to_come / 1e6:,.1f} MB to come")
    return to_come


def _fetch(transfer: Transfer, staging: Staging, names: set[str], before: int, parallel: int, on_progress: OnProgress) -> None:
    check_space(staging.target, bytes_of(staging.manifest.files, names) - staging.partial_bytes(names))
    if names:
        fetch_files(transfer, staging.folder, {name: staging.manifest.files[name] for name in names}, parallel, on_progress, before)


def fetch_beside(transfer: Transfer, folder: Path, names: Mapping[str, bytes | None], on_progress: OnProgress = silent) -> None:
    """Fetch into a folder what lies beside the manifest, as far as it is there and was not read already (b'': it is not there).

    Those of our JSON files that do not match their own digest are left out.
    """
    for name, read in names.items():
        if read == b"":
            continue
        try:
            content = read or read_small(transfer, transfer.places[0], name, MAX_BESIDE_BYTES)
            if name in ("run.json", "stats.json"):
                parse_json(content, Path(name))
            write_bytes(folder / name, content)
        except Failure as e:
            if not e.missing:
                on_progress("warning", 0, 0, f"{name}, which lies beside the manifest, did not come: it {e.reason}")
        except DamagedStore as e:
            on_progress("warning", 0, 0, f"{name}, which lies beside the manifest, is left out: {e.message}")


def _would_pull(transfer: Transfer, target: Path, staging: Staging, choice: Choice, parallel: int, on_progress: OnProgress) -> Pulled:
    """Tell what a pull would bring; the index that a choice of rows needs comes into a scratch folder."""
    manifest, frame = staging.manifest, None
    specs = specs_of(manifest)
    if not choice.all_rows:
        staging.begin()
        names = frame_files(manifest, specs)
        _fetch(transfer, staging, names, 0, parallel, on_progress)
        frame = Store(staging.show(names, transfer.places[0].name))
    chosen = chosen_files(choice, manifest, specs, frame, on_progress)
    there = Staging(target, manifest, staging.encoded).sized(chosen)
    _tell(manifest, chosen, chosen - there, on_progress)
    return _pulled(target, transfer, manifest, chosen, there, whole=len(chosen) == len(manifest.files), dry_run=True)


def _pulled(target: Path, transfer: Transfer, manifest: Manifest, files: set[str], kept: set[str], *, whole: bool, dry_run: bool = False) -> Pulled:
    of = manifest.files
    sizes = {"files": len(files), "of_files": len(of), "bytes": bytes_of(of, files), "of_bytes": bytes_of(of, of)}
    there = {"kept_files": len(kept), "kept_bytes": bytes_of(of, kept)}
    source: Place = transfer.places[0]
    return Pulled(str(target), source.name, manifest.digest, **sizes, **there, received_bytes=transfer.received, whole=whole, dry_run=dry_run)
