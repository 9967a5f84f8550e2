"""`kdstore list ...`: what can be named."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Annotated

import typer

from kdstore.cli.options import STAGES, Json
from kdstore.cli.screen import show
from kdstore.errors import UnknownName

list_app = typer.Typer(rich_markup_mode=None, help="List what can be named.")


@list_app.command("teachers")
def list_teachers(as_json: Json = False) -> None:
    """List the demo teachers, and every open_clip architecture with its tags."""
    import open_clip

    from kdstore.models.names import DEFAULT_TAGS, architectures, demo_teachers

    tags = {arch: open_clip.list_pretrained_tags_by_model(arch) for arch in architectures()}
    lines = [f"{name} (built in)" for name in demo_teachers()]
    lines += [f"{arch}: {', '.join(f'{t} (default)' if DEFAULT_TAGS.get(arch) == t else t for t in found)}" for arch, found in tags.items() if found]
    show({"built_in": list(demo_teachers()), "tags": tags, "defaults": DEFAULT_TAGS}, as_json, text="\n".join(lines))


@list_app.command("students")
def list_students(
    names: Annotated[list[str] | None, typer.Argument(help="Count these instead: any architecture of open_clip, a config file or a model folder.")] = None,
    as_json: Json = False,
) -> None:
    """List the ready students with their parameters and multiply-accumulates; any other architecture or config file can be one too."""
    from dataclasses import asdict

    from kdstore.distill.students import STUDENTS, count, table

    students = {name: count(name) for name in names} if names else STUDENTS
    show({name: asdict(student) for name, student in students.items()}, as_json, text=table(students))


@list_app.command("losses")
def list_losses(as_json: Json = False) -> None:
    """List the losses; weighted sums of them are losses too."""
    from kdstore.distill.losses import describe_losses

    show(describe_losses(), as_json)


@list_app.command("codecs")
def list_codecs(as_json: Json = False) -> None:
    """List the value codecs of --encode and --reduce; chains of them, such as pool7+pca256+int8, are codecs too."""
    forms = {
        "poolG": "averages a square grid of image tokens to G x G",
        "pcaK": "the K principal components, as floats unless int8 or pq follows",
        "float16": "floats of 2 bytes, the default",
        "float32": "floats of 4 bytes",
        "int8": "a byte per channel, with a step per channel",
        "pqM": "product quantisation: M bytes per vector (M divides its width)",
    }
    show(forms, as_json)


@list_app.command("sources")
def list_sources(as_json: Json = False) -> None:
    """List the kinds of data that --data takes."""
    forms = {
        "scenes[/SPLIT][:N]": "the built-in world; splits train, val, test, retrieval",
        "FOLDER": "images with metadata.csv, .jsonl or .parquet (file_name, caption or captions), or tars, or a folder per class",
        "images:FOLDER": "all images in and below a folder, without captions: what a VQA data set asks about",
        "FILE": "a .csv, .tsv, .json, .jsonl or .parquet table with image (path or bytes) and caption columns",
        "shards/{00000..00099}.tar": "plain tars of webdataset or img2dataset, by braces, globs or name",
        "captions_NAME.json": "COCO captions with the image folder NAME near it (?images=FOLDER)",
        "hf:ORG/NAME[/CONFIG][:SPLIT]": "a dataset of the Hugging Face Hub",
        "...?image=A&caption=B,C&synthetic=D&probe=E": "names columns (tables), or suffixes of members and json fields (tars)",
        "scenes...?probe=LABEL": "the built-in world with labels, such as leftmost-color",
        "scenes...?swapped=color,shape,...": "the built-in world with pairs of a true and a false caption that differ in a class of words",
        "...?key=NAME, ?key=sha256": "keys from a column or field, or from the images' content",
    }
    show(forms, as_json)


@list_app.command("vqa")
def list_vqa(as_json: Json = False) -> None:
    """List the VQA data sets; docs/vqa-datasets.md says what to download for each."""
    from kdstore.evaluate.datasets import VQA_DATASETS

    show({"datasets": [*VQA_DATASETS, "hf:ORG/NAME"]}, as_json, text="\n".join([*VQA_DATASETS, "hf:ORG/NAME"]))


@list_app.command("settings")
def list_settings(stage: Annotated[str, typer.Argument(help=f"{', '.join(STAGES)}.")], as_json: Json = False) -> None:
    """List all settings of a stage with their types and defaults, as --set and recipes take them."""
    if stage not in STAGES:
        raise UnknownName.of("stage", stage, STAGES)
    module, _, name = STAGES[stage].partition(":")
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    forms = {f.name: f"{f.type}" + ("" if f.default is dataclasses.MISSING else f" = {f.default!r}") for f in fields}
    show(forms, as_json)
