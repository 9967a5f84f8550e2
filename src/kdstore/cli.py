"""The command line: parse, one library call, print. Stages are imported inside commands, so that `--help` needs none of them.

Results go to stdout (text, or JSON with --json), progress and notices to stderr. An error of ours is one line and exit code 1;
an interrupted run is exit code 130 and says how to go on. Anything else is a bug and stays a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kdstore import __version__
from kdstore.config import make_config, parse_set, read_recipe
from kdstore.errors import Interrupted, KdstoreError
from kdstore.progress import OnProgress

C = TypeVar("C")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil CLIP-style models from a store of precomputed teacher features.",
)
evaluate_app = typer.Typer(rich_markup_mode=None, help="Score a model: visual question answering, retrieval.")
store_app = typer.Typer(rich_markup_mode=None, help="Look at a feature store and check it.")
list_app = typer.Typer(rich_markup_mode=None, help="List what can be named.")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(store_app, name="store")
app.add_typer(list_app, name="list")

Recipe = Annotated[Path | None, typer.Option(help="TOML file with a table per stage.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any other setting, as key=value.", metavar="KEY=VALUE")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[str | None, typer.Option(help="scenes[/SPLIT][:N], a folder with metadata, a table, or hf:ORG/NAME.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int | None, typer.Option(help="Seed of all randomness.")]
ModelOption = Annotated[str | None, typer.Option(help="A run folder, ARCH[:TAG], hf-hub:ORG/NAME, local-dir:PATH or a demo teacher.")]
SECTIONS = {"extract", "distill", "vqa", "retrieval", "demo"}
UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer Typers carry inside
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; the entry point of the `kdstore` script."""
    try:
        sys.exit(_run())
    except Interrupted as e:
        _say(f"interrupted: {e}")
        sys.exit(EXIT_INTERRUPTED)
    except KdstoreError as e:
        _say(f"error: {e}")
        sys.exit(1)
    except UsageError as e:
        _say(f"error: {e.format_message()} See {e.ctx.command_path if e.ctx else 'kdstore'} --help.")
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run() -> int | None:
    """Run the command and return the code of its typer.Exit, if any; raises Interrupted for Ctrl-C, which Typers tell in three ways."""
    try:
        code: int | None = app(sys.argv[1:] or ["--help"], prog_name="kdstore", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        raise Interrupted("Stopped; what was finished is kept.")
    return code


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"kdstore {__version__}")
        raise typer.Exit()


@app.command()
def extract(
    teacher: Annotated[str | None, typer.Option(help="ARCH[:TAG], hf-hub:ORG/NAME, local-dir:PATH or a demo teacher (scenes-S, scenes-L).")] = None,
    pretrained: Annotated[str | None, typer.Option(help="A tag or a checkpoint file.")] = None,
    data: Data = None,
    out: Annotated[str | None, typer.Option(help="The store; default: store/<short name of the teacher>.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token features to keep: none, image, text or both.")] = None,
    unit_rows: Annotated[int | None, typer.Option(help="Rows that are written, and resumed, at once.")] = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Run a teacher once over the data and write its features to a store; run again to resume."""
    from kdstore.extract.config import ExtractConfig

    options = {"teacher": teacher, "pretrained": pretrained, "data": data, "out": out, "tokens": tokens, "unit_rows": unit_rows, "device": device}
    config = _config(ExtractConfig, "extract", recipe, settings, options)
    if data is None and config.data == "scenes":
        _say("notice: no --data, so the built-in scenes are used.")
    from kdstore.extract import run

    with _bars() as on_progress:
        result = run.extract(config, on_progress=on_progress)
    _print(result, as_json)


@app.command()
def distill(
    cache: Annotated[str | None, typer.Option(help="The store of the teacher's features; without one, the student learns alone.")] = None,
    data: Data = None,
    student: Annotated[str | None, typer.Option(help="An open_clip architecture, ViT-T-16 or scenes-T.")] = None,
    loss: Annotated[str | None, typer.Option(help="See 'kdstore list losses'; sums like 'clip + 1*crd' too.")] = None,
    out: Annotated[str | None, typer.Option(help="The run folder.")] = None,
    samples: Annotated[int | None, typer.Option(help="Image-caption pairs to see in all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs in a batch.")] = None,
    seed: Seed = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on with an unfinished run.")] = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train a student against the cached features; the run folder is an open_clip model."""
    from kdstore.distill.config import DistillConfig

    options = {"cache": cache, "data": data, "student": student, "loss": loss, "out": out, "samples": samples, "batch_size": batch_size}
    config = _config(DistillConfig, "distill", recipe, settings, {**options, "seed": seed, "resume": resume, "device": device})
    from kdstore.distill import train

    with _bars() as on_progress:
        result = train.distill(config, on_progress=on_progress)
    _print(result, as_json)


@evaluate_app.command("vqa")
def evaluate_vqa(
    model: ModelOption = None,
    pretrained: Annotated[str | None, typer.Option(help="A tag or a checkpoint file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="See 'kdstore list vqa'.")] = None,
    folder: Annotated[str | None, typer.Option("--data-dir", help="Folder of the data set's files.")] = None,
    head: Annotated[str | None, typer.Option(help="coattention, or pooled (a weak baseline).")] = None,
    question_encoder: Annotated[str | None, typer.Option(help="scratch, or own-text-tower (a second protocol).")] = None,
    controls: Annotated[bool | None, typer.Option("--controls/--no-controls", help="Rows question-only, untrained, vocabulary-oracle.")] = None,
    out: Annotated[str | None, typer.Option(help="Result file.")] = None,
    seed: Seed = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train a head on frozen image tokens and score its answers by the official VQA accuracy."""
    from kdstore.evaluate.protocol import VqaConfig

    options = {"model": model, "pretrained": pretrained, "dataset": dataset, "folder": folder, "head": head, "question_encoder": question_encoder}
    config = _config(VqaConfig, "vqa", recipe, settings, {**options, "controls": controls, "out": out, "seed": seed, "device": device})
    from kdstore.evaluate import vqa
    from kdstore.evaluate.results import markdown_table

    with _bars() as on_progress:
        result = vqa.evaluate_vqa(config, on_progress=on_progress)
    _print(result.content, as_json, text=markdown_table([result.content]))


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    model: ModelOption = None,
    pretrained: Annotated[str | None, typer.Option(help="A tag or a checkpoint file.")] = None,
    data: Data = None,
    out: Annotated[str | None, typer.Option(help="Result file.")] = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Measure recall at 1, 5 and 10 of images by their captions and back, beside what repeated captions allow."""
    from kdstore.evaluate import retrieval
    from kdstore.evaluate.results import markdown_table

    options = {"model": model, "pretrained": pretrained, "data": data, "out": out, "device": device}
    config = _config(retrieval.RetrievalConfig, "retrieval", recipe, settings, options)
    with _bars() as on_progress:
        result = retrieval.evaluate_retrieval(config, on_progress=on_progress)
    _print(result.content, as_json, text=markdown_table([result.content]))


@store_app.command("info")
def store_info(path: Path, as_json: Json = False) -> None:
    """Tell what a store holds: teacher, source, arrays, digest."""
    from kdstore.store import open_store

    _print(open_store(path).summary(), as_json)


@store_app.command("verify")
def store_verify(path: Path, as_json: Json = False) -> None:
    """Compare every byte of a store with its manifest; exit code 1 names every damaged file and its rows."""
    from kdstore.store import verify_store

    with _bars() as on_progress:
        report = verify_store(path, on_progress=on_progress)
    if as_json:
        _print(report, as_json)
    elif not report.damaged:
        print(f"{path}: {report.num_files} files, {report.num_bytes / 1e6:.1f} MB, whole ({report.digest}).")
    for damage in report.damaged:
        rows = "the whole store" if damage.rows is None else f"rows {damage.rows[0]} to {damage.rows[1] - 1}"
        _say(f"damaged: {damage.path} ({rows}) {damage.reason}")
    if report.damaged:
        raise typer.Exit(1)


@store_app.command("stats")
def store_stats(path: Path, as_json: Json = False) -> None:
    """Measure norms, mean, variance and values that are not finite of every array."""
    from kdstore import store

    with _bars() as on_progress:
        stats = store.store_stats(path, on_progress=on_progress)
    lines = [f"{name}: {s['rows']} rows, {s['nan']} NaN, {s['inf']} infinite, norm {s['norm']}" for name, s in stats["arrays"].items()]
    _print(stats, as_json, text="\n".join(lines))


@list_app.command("teachers")
def list_teachers(as_json: Json = False) -> None:
    """List the demo teachers, and every open_clip architecture with its tags."""
    import open_clip

    from kdstore.models.names import DEFAULT_TAGS, architectures, demo_teachers

    tags = {arch: open_clip.list_pretrained_tags_by_model(arch) for arch in architectures()}
    lines = [f"{name} (built in)" for name in demo_teachers()]
    lines += [f"{arch}: {', '.join(f'{t} (default)' if DEFAULT_TAGS.get(arch) == t else t for t in found)}" for arch, found in tags.items() if found]
    _print({"built_in": list(demo_teachers()), "tags": tags, "defaults": DEFAULT_TAGS}, as_json, text="\n".join(lines))


@list_app.command("students")
def list_students(as_json: Json = False) -> None:
    """List the architectures that kdstore adds to open_clip's (any of which can be a student)."""
    from kdstore.models.names import CONFIGS

    names = sorted(p.stem for p in CONFIGS.glob("*.json"))
    _print({"students": names}, as_json, text="\n".join([*names, "... and every open_clip architecture ('kdstore list teachers')"]))


@list_app.command("losses")
def list_losses(as_json: Json = False) -> None:
    """List the losses; weighted sums of them are losses too."""
    from kdstore.distill.losses import describe_losses

    _print(describe_losses(), as_json)


@list_app.command("sources")
def list_sources(as_json: Json = False) -> None:
    """List the kinds of data that --data takes."""
    forms = {
        "scenes[/SPLIT][:N]": "the built-in world; splits train, val, test, retrieval",
        "FOLDER": "images with metadata.csv, .jsonl or .parquet (file_name, caption or captions)",
        "FILE": "a .csv, .tsv, .json, .jsonl or .parquet table with image (path or bytes) and caption columns",
        "hf:ORG/NAME[/CONFIG][:SPLIT]": "a dataset of the Hugging Face Hub",
        "...?image=COLUMN&caption=COLUMN&key=COLUMN": "names the columns of any of these",
    }
    _print(forms, as_json)


@list_app.command("vqa")
def list_vqa(as_json: Json = False) -> None:
    """List the VQA data sets."""
    from kdstore.evaluate.datasets import VQA_DATASETS

    _print({"datasets": list(VQA_DATASETS)}, as_json, text="\n".join(VQA_DATASETS))


@app.command()
def demo(
    out: Annotated[str | None, typer.Option(help="Folder of everything that the demo makes.")] = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on the built-in scenes: extract, distil, fine-tune, score, one table and report.html."""
    from kdstore.demo.config import DemoConfig

    config = _config(DemoConfig, "demo", recipe, settings, {"out": out})
    from kdstore.demo import run
    from kdstore.demo.report import table_as_markdown

    with _bars() as on_progress:
        result = run.run_demo(config, on_progress=on_progress)
    _print(result.content, as_json, text=f"{table_as_markdown(result.content)}\nReport: {result.report}")


def _config(cls: type[C], section: str, recipe: Path | None, settings: list[str] | None, options: dict[str, Any]) -> C:
    """Build a stage's configuration from recipe < --set < options."""
    tables = read_recipe(recipe, SECTIONS)
    return make_config(cls, tables.get(section, {}), parse_set(settings), options, where=f"[{section}]")


def _print(result: Any, as_json: bool, text: str | None = None) -> None:
    content = dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        print(json.dumps(content, indent=1, default=str))
    elif text is not None:
        print(text.rstrip())
    else:
        for name, value in content.items():
            print(f"{name:>24}  {value if not isinstance(value, dict | list | tuple) else json.dumps(value, default=str)}")


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


@contextlib.contextmanager
def _bars() -> Iterator[OnProgress]:
    """Draw a bar per stage on stderr, with rate and time left; a notice is printed above them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    _quiet_libraries()
    _keep_freed_memory()
    console = Console(stderr=True)
    name, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = (name, BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), note)
    tasks: dict[str, TaskID] = {}
    bars = Progress(*columns, console=console, refresh_per_second=4)

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage in ("warning", "notice"):
            console.print(f"{stage}: {note}", style="yellow" if stage == "warning" else None, markup=False, highlight=False, soft_wrap=True)
            return
        bars.start()  # at the first report, so that an error before it is one line alone
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, note=note)
        bars.update(tasks[stage], completed=done, total=total, note=note)

    try:
        yield on_progress
    finally:
        if tasks:
            bars.stop()


def _quiet_libraries() -> None:
    """Keep other libraries' bars and retry messages off the screen; their errors become ours."""
    import logging

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read at its import, which most commands do without
    for name in ("huggingface_hub", "datasets", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Let glibc keep what large tensors free: they come back every step, and fresh pages made a small student's step 1.4 times as long."""
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
