"""Options that several commands share, and how they become a stage's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kdstore.config import make_config, parse_set, read_recipe

C = TypeVar("C")

Recipe = Annotated[Path | None, typer.Option(help="TOML file with a table per stage.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any other setting, as key=value; see 'kdstore list settings'.", metavar="KEY=VALUE")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[str | None, typer.Option(help="scenes[/SPLIT][:N], a folder with metadata, a table, or hf:ORG/NAME.")]
SignedBy = Annotated[Path | None, typer.Option(metavar="FILE", help="Allowed signers, as of ssh-keygen: the store must be signed by one of them.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int | None, typer.Option(help="Seed of all randomness.")]
ModelOption = Annotated[str | None, typer.Option(help="A run folder, ARCH[:TAG], hf-hub:ORG/NAME, local-dir:PATH or a demo teacher.")]
Pretrained = Annotated[str | None, typer.Option(help="A tag or a checkpoint file.")]
Out = Annotated[str | None, typer.Option(help="Result file.")]
STAGES = {  # where the settings of each are, imported when asked for
    "extract": "kdstore.extract.config:ExtractConfig",
    "distill": "kdstore.distill.config:DistillConfig",
    "vqa": "kdstore.evaluate.protocol:VqaConfig",
    "score": "kdstore.evaluate.protocol:ScoreConfig",
    "zeroshot": "kdstore.evaluate.protocol:ZeroshotConfig",
    "retrieval": "kdstore.evaluate.protocol:RetrievalConfig",
    "probe": "kdstore.evaluate.protocol:ProbeConfig",
    "agreement": "kdstore.evaluate.protocol:AgreementConfig",
    "study": "kdstore.study.config:Grid",
    "demo": "kdstore.demo.config:DemoConfig",
}


def config_of(cls: type[C], section: str, recipe: Path | None, settings: list[str] | None, options: dict[str, Any]) -> C:
    """Build a stage's configuration from recipe < --set < options."""
    tables = read_recipe(recipe, set(STAGES))
    return make_config(cls, tables.get(section, {}), parse_set(settings), options, where=f"[{section}]", hint=f"All: kdstore list settings {section}.")
