"""`kdstore store ...`: look at a feature store, check it, change it."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdstore.address import is_address
from kdstore.cli import publish
from kdstore.cli.options import Data, Device, Json, SignedBy
from kdstore.cli.screen import bars, in_bytes, say, show
from kdstore.errors import ConfigError

if TYPE_CHECKING:
    from kdstore.extract.recompute import RecomputeReport
    from kdstore.store import StoreDifference, StoreProgress

store_app = typer.Typer(rich_markup_mode=None, help="Look at a store of features, check, join, push, pull, sign, import it.")
store_app.command("card")(publish.card)
store_app.command("sign")(publish.sign)
store_app.command("withdraw")(publish.withdraw)
store_app.command("import")(publish.import_features)


@store_app.command("info")
def store_info(path: Annotated[str, typer.Argument(help="A folder, or an address as in 'store pull'.")], as_json: Json = False) -> None:
    """Tell what a store holds: teacher, source, arrays, digest; or how far an incomplete one is, and who writes it."""
    from kdstore import store

    progress = None if is_address(path) else store.store_progress(Path(path))
    if progress is None:
        show({"complete": True, **store.open_store(path).summary()}, as_json)
    else:
        show(progress, as_json, text=_progress_lines(progress))


def _progress_lines(found: StoreProgress) -> str:
    begun = f"not complete, {found.units_recorded} of {found.units} units recorded" if found.units else "being pulled" if found.pulled else "being planned"
    lines = [f"{found.path}: {begun}"]
    lines += [f"{'teacher':>10}  {found.teacher}"] if found.teacher else []
    for what, recorded, planned in (("images", found.images_recorded, found.images), ("texts", found.texts_recorded, found.texts)):
        lines.append(f"{what:>10}  {recorded} of {planned}")
    lines.append(f"{'bytes':>10}  {in_bytes(found.bytes_in_place)} in place, {in_bytes(found.bytes_staged)} in unfinished units")
    lines += [f"{'staged':>10}  {found.units_staged} units by parts; when all have ended: kdstore store finalise {found.path}"] if found.units_staged else []
    lines += [f"{'recorded':>10}  {found.last_record}"] if found.last_record else []
    again = "" if found.units_staged else "; run the same command again to go on"
    if found.writer is None:
        said = f"nobody{again}"
    else:
        state = "alive" if found.writer.alive else f"dead{again}"
        said = f"process {found.writer.pid} on {found.writer.host} since {found.writer.since}, last beat {found.writer.last_beat}: {state}"
    return "\n".join([*lines, f"{'writer':>10}  {said}"])


@store_app.command("finalise")
def store_finalise(path: Path, as_json: Json = False) -> None:
    """Seal a store that was extracted in parts, once all of them have ended."""
    from kdstore import store

    with bars() as on_progress:
        store.finalise_store(path, on_progress=on_progress)
    show(store.open_store(path).summary(), as_json)


@store_app.command("unlock")
def store_unlock(
    path: Path,
    force: Annotated[bool, typer.Option("--force", help="Also if the writer lives; it then stops before its next commit.")] = False,
    as_json: Json = False,
) -> None:
    """Remove the lock of a writer that is dead. A run that is started again does so by itself."""
    from kdstore import store

    holder = store.unlock_store(path, force=force)
    said = f"{path} has no lock; nothing was done."
    if holder is not None:
        said = f"The lock of {holder} (since {holder.since or 'unknown'}) was removed from {path}{' by force' if force else ': it is dead'}."
    show({"path": str(path), "removed": holder and dataclasses.asdict(holder)}, as_json, text=said)


@store_app.command("verify")
def store_verify(
    path: Path,
    sample: Annotated[str | None, typer.Option(help="Read only so much, such as 5% or 20GB: some chunks of every shard.")] = None,
    recompute: Annotated[int, typer.Option(min=0, metavar="K", help="Run the teacher again on K random images and texts, and compare.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of what is chosen; another one each time if not given.")] = None,
    teacher: Annotated[str | None, typer.Option(help="For --recompute, if the store's own name of it does not say where it is.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Its tag or checkpoint file.")] = None,
    data: Data = None,
    device: Device = None,
    signed_by: SignedBy = None,
    as_json: Json = False,
) -> None:
    """Check a store: its structure, then its bytes.

    Exit code 0: whole; 1: damaged, every file and its rows are named (or its teacher says otherwise, --recompute; or it is not signed as asked, --signed-by);
    2: cannot be read, or wrong options.
    """
    from kdstore.errors import DamagedStore, KdstoreError, SignatureError
    from kdstore.store import check_store_signature, verify_store
    from kdstore.store.layout import rows_said

    again = None
    try:
        signer = None if signed_by is None else check_store_signature(path, signed_by)
        with bars() as on_progress:
            report = verify_store(path, sample=sample, seed=seed, on_progress=on_progress)
            if recompute and report.ok:
                from kdstore.extract import recompute as extract_again

                origin: dict[str, Any] = {"teacher": teacher, "pretrained": pretrained, "data": data, "device": device or "auto"}
                again = extract_again.recompute(path, recompute, seed=seed, **origin, on_progress=on_progress)
    except DamagedStore as e:  # of the manifest, without which there is no list of files
        say(f"damaged: {str(e).removeprefix(f'{path}/')}")
        raise typer.Exit(1) from e
    except SignatureError as e:
        say(f"error: {e}")
        raise typer.Exit(1) from e
    except KdstoreError as e:
        say(f"error: {e}")
        raise typer.Exit(2) from e
    for what, found in (("damaged", report.damaged), ("cannot be read", report.unreadable)):
        for damage in found:
            say(f"{what}: {damage.path} ({'the whole store' if damage.rows is None else rows_said(*damage.rows)}) {damage.reason}")
    if report.damaged:
        say(f"Bring these files back from another copy of the store (files that are not in the manifest: remove them), then: kdstore store verify {path}")
    elif report.unreadable:
        say(f"Check the rights and the disk, then: kdstore store verify {path}")
    read, sound = "", "no damage in this part" if report.absent else "whole"
    of = f" of {report.num_files + report.absent}" if report.absent else ""
    if report.seed is not None:
        share = 100 * report.read_bytes / max(1, report.num_bytes)
        read, sound = f", {share:.2g} % of the bytes read (--seed {report.seed})", "no damage in what was read"
    lines = [f"{path}: {report.num_files}{of} files, {report.num_bytes / 1e6:.1f} MB{read}, {sound if report.ok else 'not whole'} ({report.digest})."]
    lines += [f"signed by {signer}"] if signer else []
    lines += _recomputed(again) if again else []
    show({**dataclasses.asdict(report), "signed_by": signer, "recompute": again and dataclasses.asdict(again)}, as_json, text="\n".join(lines))
    if not report.ok or (again and not again.ok):
        raise typer.Exit(1 if report.damaged or again else 2)


def _recomputed(report: RecomputeReport) -> list[str]:
    """Say what the teacher computes otherwise; returns a line per array."""
    for name, compared in report.arrays.items():
        if compared.failed:
            rows = ", ".join(map(str, compared.failed[:8])) + (", ..." if len(compared.failed) > 8 else "")
            say(f"{name}: {len(compared.failed)} of {compared.rows} rows differ from what {report.teacher} says: {rows}")
    for part, (stored, live) in report.differs.items():
        say(f"{part}: {live} of {report.teacher} is not the store's {stored}")
    lines = [f"{name}: {c.rows} rows computed again, least cosine {c.worst:.6f} (row {c.worst_row})" for name, c in report.arrays.items()]
    return [*lines, *(f"{name}: not compared, it does not hold the teacher's own values" for name in report.skipped)]


@store_app.command("stats")
def store_stats(
    path: Path, max_samples: Annotated[int, typer.Option(min=1, help="Vectors of the covariance's spectrum, at most.")] = 262_144, as_json: Json = False
) -> None:
    """Measure norms, mean, variance, the covariance's spectrum and values that are not finite of every array; written to stats.json."""
    from kdstore import store

    with bars() as on_progress:
        stats = store.store_stats(path, max_samples=max_samples, on_progress=on_progress)
    show(stats, as_json, text="\n".join(f"{name}: {_stats_line(of_array)}" for name, of_array in stats["arrays"].items()))


def _stats_line(found: dict[str, Any]) -> str:
    said = f"{found['rows']} rows, {found['nan']} NaN, {found['inf']} infinite"
    said += f", decoded from {found['codec']}" if "codec" in found else f", {found['at_limit']} at the limit of the type"
    if "norm" in found:
        said += ", norm {min:.4g} to {max:.4g}, mean {mean:.4g}".format(**found["norm"])
    if sums := list(accumulate(found.get("spectrum", []))):
        said += f", 90 % of the variance in {sum(part < 0.9 * sums[-1] for part in sums) + 1} of {len(sums)} dimensions"
    return said


Arrays = Annotated[str, typer.Option(help="Names of arrays, with commas between them; default: all that it can apply to.")]
Out = Annotated[Path, typer.Option(help="The new store.")]


@store_app.command("recode")
def store_recode(
    path: Path,
    out: Out,
    codec: Annotated[str | None, typer.Option(help="bytes or zstd, each with crc32c.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 or float32.")] = None,
    chunk_rows: Annotated[int | None, typer.Option(help="Rows of an inner chunk.")] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows of a shard.")] = None,
    arrays: Arrays = "",
    allow_overflow: Annotated[bool, typer.Option("--allow-overflow", help="Let values beyond float16 become infinite.")] = False,
    as_json: Json = False,
) -> None:
    """Write the same rows with another codec, precision, chunking or shard size into a new store; run again to resume."""
    from kdstore import store

    encoding = store.Encoding(codec, dtype, chunk_rows, shard_rows)
    with bars() as on_progress:
        made = store.recode_store(path, out, encoding, arrays=_names(arrays), allow_overflow=allow_overflow, on_progress=on_progress)
    show(made, as_json)


@store_app.command("subset")
def store_subset(
    path: Path,
    out: Out,
    rows: Annotated[str | None, typer.Option(help="START:STOP of the image rows, as Python slices them.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A text file with a key per line.")] = None,
    arrays: Arrays = "",
    as_json: Json = False,
) -> None:
    """Write some rows or some arrays of a store into a new one; run again to resume."""
    from kdstore import store

    chosen = None if rows is None else _slice(rows)
    with bars() as on_progress:
        made = store.subset_store(path, out, rows=chosen, keys=None if keys is None else store.read_keys(keys), arrays=_names(arrays), on_progress=on_progress)
    show(made, as_json)


@store_app.command("concat")
def store_concat(paths: list[Path], out: Out, as_json: Json = False) -> None:
    """Write stores of the same features and of different keys into one, in the order given; run again to resume."""
    from kdstore import store

    with bars() as on_progress:
        made = store.concat_stores(paths, out, on_progress=on_progress)
    show(made, as_json)


@store_app.command("join")
def store_join(
    path: Path,
    source: Annotated[str, typer.Argument(help="What --data takes.")],
    content: Annotated[bool, typer.Option("--content/--keys-only", help="Read all images and compare their bytes, or look at keys alone.")] = True,
    out: Annotated[Path | None, typer.Option(help="A new parquet file for the rows that match.")] = None,
    as_json: Json = False,
) -> None:
    """Tell how a store and a source go together: images that match, that one lacks, and whose bytes differ."""
    from kdstore import store
    from kdstore.data.sources import open_source

    with bars() as on_progress:
        report = store.report_join(store.open_store(path), open_source(source), content=content, out=out, on_progress=on_progress)
    show(report, as_json)


@store_app.command("diff")
def store_diff(first: Path, second: Path, as_json: Json = False) -> None:
    """Tell how two stores differ: identity, arrays, rows by key, and the values of common rows; exit code 1 if they do."""
    from dataclasses import asdict

    from kdstore import store

    with bars() as on_progress:
        found = store.diff_stores(first, second, on_progress=on_progress)
    show({"same": found.same, **asdict(found)}, as_json, text=_diff_lines(found))
    raise typer.Exit(0 if found.same else 1)


def _diff_lines(found: StoreDifference) -> str:
    fields = {**{f"identity.{name}": both for name, both in found.identity.items()}, **{f"arrays.{name}": both for name, both in found.layout.items()}}
    lines = [f"{name}: {a or 'nothing'} -> {b or 'nothing'}" for name, (a, b) in fields.items()]
    lines += [f"images: {found.images_in_both} in both, {found.images_only_in_first} only in the first, {found.images_only_in_second} only in the second"]
    lines += [f"texts: {found.texts_in_both} in both, {found.texts_only_in_first} only in the first, {found.texts_only_in_second} only in the second"]
    for name, of_array in found.arrays.items():
        cosine = "" if of_array.cosine_min is None else f", cosine {of_array.cosine_min:.6f} at least, {of_array.cosine_mean:.6f} on average"
        lines.append(f"{name}: {of_array.unequal} values differ in {of_array.rows} rows, by {of_array.max_abs:.3g} at most{cosine}")
    lines += [f"not compared: {', '.join(found.not_compared)}"] if found.not_compared else []
    return "\n".join([*lines, "equal values for the same rows" if found.same else "they differ"])


def _names(arrays: str) -> list[str]:
    return [name.strip() for name in arrays.split(",") if name.strip()]


def _slice(text: str) -> slice:
    try:
        start, stop = (int(bound) if bound else None for bound in text.split(":"))
        return slice(start, stop)
    except ValueError as e:
        raise ConfigError(f"--rows is START:STOP, found '{text}'.", "For the first thousand rows: --rows :1000.") from e


@store_app.command("pull")
def store_pull(
    source: Annotated[str, typer.Argument(help="A folder, s3://, gs://, http(s):// or hf://datasets/ORG/NAME[@REVISION].")],
    target: Annotated[str, typer.Argument(help="A folder.")],
    expect: Annotated[str | None, typer.Option(metavar="sha256:...", help="The digest that the store must have.")] = None,
    signed_by: SignedBy = None,
    mirror: Annotated[list[str] | None, typer.Option(help="Another place with the same files; may be given again.")] = None,
    arrays: Arrays = "",
    rows: Annotated[str | None, typer.Option(help="START:STOP of the image rows, as Python slices them.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A text file with a key per line: rows with these keys.")] = None,
    for_source: Annotated[str | None, typer.Option("--for", metavar="SOURCE", help="Rows that join with this source (what --data takes).")] = None,
    by_content: Annotated[bool, typer.Option("--content", help="With --for: images of other keys too, by their bytes, which reads all of the source.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a store of other features.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell files and bytes, and write nothing.")] = False,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Files at once.")] = 8,
    as_json: Json = False,
) -> None:
    """Bring a store or a part of one into a folder, every file compared with its sha256; run again to go on or to complete a part."""
    from kdstore import store
    from kdstore.data.sources import open_source
    from kdstore.store import share

    chosen = None if rows is None else _slice(rows)
    named = None if keys is None else tuple(store.read_keys(keys))
    with bars() as on_progress:
        data = None if for_source is None else open_source(for_source, on_progress=on_progress)
        choice = share.Choice(tuple(_names(arrays)), chosen, named, data, by_content)
        options: dict[str, Any] = {"expect": expect, "signed_by": signed_by, "mirrors": mirror or (), "force": force, "dry_run": dry_run, "parallel": parallel}
        show(share.pull_store(source, target, choice=choice, **options, on_progress=on_progress), as_json)


@store_app.command("push")
def store_push(
    path: Path,
    target: Annotated[str, typer.Argument(help="A folder, s3://, gs:// or hf://datasets/ORG/NAME[@BRANCH].")],
    force: Annotated[bool, typer.Option("--force", help="Replace a store of other features.")] = False,
    as_json: Json = False,
) -> None:
    """Send a store to a place, its manifest last; run again to go on."""
    from kdstore.store import share

    with bars() as on_progress:
        show(share.push_store(path, target, force=force, on_progress=on_progress), as_json)
