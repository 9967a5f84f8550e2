"""`kdstore store ...`: look at a feature store, check it, change it."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer

from kdstore.cli.options import Json
from kdstore.cli.screen import bars, say, show

store_app = typer.Typer(rich_markup_mode=None, help="Look at a feature store and check it.")


@store_app.command("info")
def store_info(path: Path, as_json: Json = False) -> None:
    """Tell what a store holds: teacher, source, arrays, digest."""
    from kdstore.store import open_store

    show(open_store(path).summary(), as_json)


@store_app.command("verify")
def store_verify(path: Path, as_json: Json = False) -> None:
    """Compare every byte of a store with its manifest; exit code 1 names every damaged file and its rows."""
    from kdstore.store import verify_store

    with bars() as on_progress:
        report = verify_store(path, on_progress=on_progress)
    if as_json:
        show(report, as_json)
    elif not report.damaged:
        print(f"{path}: {report.num_files} files, {report.num_bytes / 1e6:.1f} MB, whole ({report.digest}).")
    for damage in report.damaged:
        rows = "the whole store" if damage.rows is None else f"rows {damage.rows[0]} to {damage.rows[1] - 1}"
        say(f"damaged: {damage.path} ({rows}) {damage.reason}")
    if report.damaged:
        raise typer.Exit(1)


@store_app.command("stats")
def store_stats(
    path: Path, max_samples: Annotated[int, typer.Option(min=1, help="Vectors of the covariance's spectrum, at most.")] = 1_000_000, as_json: Json = False
) -> None:
    """Measure norms, mean, variance, the covariance's spectrum and values that are not finite of every array; written to stats.json."""
    from kdstore import store

    with bars() as on_progress:
        stats = store.store_stats(path, max_samples=max_samples, on_progress=on_progress)
    show(stats, as_json, text="\n".join(f"{name}: {_stats_line(of_array)}" for name, of_array in stats["arrays"].items()))


def _stats_line(found: dict[str, Any]) -> str:
    said = f"{found['rows']} rows, {found['nan']} NaN, {found['inf']} infinite, {found['at_limit']} at the limit of the type"
    if "norm" in found:
        said += ", norm {min:.4g} to {max:.4g}, mean {mean:.4g}".format(**found["norm"])
    if sums := list(accumulate(found.get("spectrum", []))):
        said += f", 90 % of the variance in {sum(part < 0.9 * sums[-1] for part in sums) + 1} of {len(sums)} dimensions"
    return said
