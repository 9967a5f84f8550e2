"""The commands of `kdstore study`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdstore.cli.options import Json
from kdstore.cli.screen import bars, say, show
from kdstore.errors import ConfigError

if TYPE_CHECKING:
    from kdstore.study.config import StudyConfig
    from kdstore.study.cost import StudyCost
    from kdstore.study.grid import Plan

study_app = typer.Typer(no_args_is_help=True, help="Do better teachers make better students? A grid of both, with controls and honest intervals.")


@study_app.command("run")
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the study (docs/study.md).")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of everything that the study makes; begun studies go on.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and what it costs, and stop.")] = False,
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
    from kdstore.study.run import check_names, finished, plan_record, run_study

    config = read_study(recipe, settings)
    check_names(config)
    plan = plan_study(config)
    done = finished(plan, out)
    cost = _cost(config, plan, done, dry_run) if len(done) < len(plan.tasks) else None
    if dry_run or not as_json:
        planned = plan_record(plan, done)
        show({**planned, "cost": cost.record if cost else None}, as_json, text=_plan_text(planned, cost))
    if dry_run:
        return
    with bars() as on_progress:
        result = run_study(config, out, workers=workers or 1, scheduler=scheduler, on_progress=on_progress)
    show(result, as_json, text=f"{result.done} of {result.total} tasks are done, {result.ran} of them by this run, in {result.path}")
    for failure in result.failed:
        say(f"failed: {failure.label}: {failure.reason} ({failure.log})")
    for label in result.skipped:
        say(f"skipped, since what it needs failed: {label}")
    if not result.complete:
        raise typer.Exit(1)


def _cost(config: StudyConfig, plan: Plan, done: set[str], dry_run: bool) -> StudyCost | None:
    """Work out what is left to pay; a run goes on where that cannot be known."""
    from kdstore.study.cost import cost_of_plan

    try:
        with bars() as on_progress:
            return cost_of_plan(config, plan, done, on_progress=on_progress)
    except ConfigError as e:
        if dry_run:
            raise
        say(f"notice: the cost is not known. {e.message}")
        return None


def _plan_text(plan: dict[str, Any], cost: StudyCost | None) -> str:
    """Write a plan for people: what is counted has a line in the tables of its cost."""
    from kdstore.study.costtable import cost_text

    counted = {line.stage for line in cost.lines} if cost else set()
    lines = [f"{plan['tasks']} tasks, {plan['done']} of them done; {plan['arms']} arms"]
    lines += [f"{kind:>16}  {count['all']:4} tasks, {count['done']} done" for kind, count in plan["kinds"].items() if kind not in counted]
    return "\n".join([*lines, *(["", cost_text(cost)] if cost else [])])


@study_app.command("report")
def report(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a study, whole or not.")],
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the report; default: DIR/report.")] = None,
    as_json: Json = False,
) -> None:
    """Write one page that opens offline, with its tables and figures as files beside it; --json prints what they are made of."""
    from kdstore.study.collect import collect
    from kdstore.study.report import write_report

    content = collect(folder)
    page = write_report(Path(out or f"{folder}/report"), content)
    show(content, as_json, text=f"{content['headline']['sentence']}\n{page}")


@study_app.command("merge")
def merge(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of studies.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder.")],
    as_json: Json = False,
) -> None:
    """Join the results that several labs have of one study; refuses what was not run alike."""
    from kdstore.study.merge import merge_studies

    show(merge_studies(folders, out), as_json)
