"""The commands of `kdstore study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdstore.cli.options import Json
from kdstore.cli.screen import bars, say, show
from kdstore.errors import ConfigError

study_app = typer.Typer(no_args_is_help=True, help="Do better teachers make better students? A grid of both, with controls and honest intervals.")


@study_app.command("run")
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the study (docs/study.md).")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of everything that the study makes; begun studies go on.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    workers: Annotated[int | None, typer.Option(help="Tasks at once on this machine, each in a process; default 1.")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="TCP://HOST:PORT", help="The scheduler of a dask cluster whose workers share DIR.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any setting of the recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Show the plan of a study, and run what is not done of it; exit code 1 if not all is done in the end."""
    if workers is not None and (scheduler is not None or workers < 1):
        raise ConfigError("Tasks run on at least one worker here, or on a cluster.", "Give --workers N, or --scheduler.")
    from kdstore.study.config import read_study
    from kdstore.study.grid import plan_study
    from kdstore.study.run import check_names, plan_record, run_study

    config = read_study(recipe, settings)
    check_names(config)
    plan = plan_record(plan_study(config), out)
    if dry_run or not as_json:
        show(plan, as_json, text=_plan_text(plan))
    if dry_run:
        return
    with bars() as on_progress:
        result = run_study(config, out, workers=workers or 1, scheduler=scheduler, on_progress=on_progress)
    show(result, as_json)
    for failure in result.failed:
        say(f"failed: {failure.label}: {failure.reason} ({failure.log})")
    for label in result.skipped:
        say(f"skipped, since what it needs failed: {label}")
    if not result.complete:
        raise typer.Exit(1)


def _plan_text(plan: dict[str, Any]) -> str:
    """Write a plan for people."""
    lines = [f"{plan['tasks']} tasks, {plan['done']} of them done; {plan['arms']} arms"]
    lines += [f"{kind:>12}  {count['all']:4} tasks, {count['done']} done" for kind, count in plan["kinds"].items()]
    lines += [f"{'store':>12}  {label}: extracted once for {students} students" for label, students in plan["students_of_a_store"].items()]
    return "\n".join(lines)


@study_app.command("merge")
def merge(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of studies.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder.")],
    as_json: Json = False,
) -> None:
    """Join the results that several labs have of one study; refuses what was not run alike."""
    from kdstore.study.merge import merge_studies

    show(merge_studies(folders, out), as_json)
