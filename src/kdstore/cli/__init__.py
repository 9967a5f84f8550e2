"""The command line: parse, one library call, print. Stages are imported inside commands, so that `--help` needs none of them.

Results go to stdout (text, or JSON with --json), progress and notices to stderr. An error of ours is one line and exit code 1 (`store verify`
has codes of its own); an interrupted run is exit code 130 and says how to go on. Anything else is a bug and stays a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer

from kdstore import __version__
from kdstore.cli.evaluate import evaluate_app
from kdstore.cli.lists import list_app
from kdstore.cli.options import Data, Device, Json, Recipe, Seed, Settings, config_of
from kdstore.cli.screen import bars, say, show
from kdstore.cli.store import store_app
from kdstore.cli.study import study_app
from kdstore.errors import Interrupted, KdstoreError, sentence

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil CLIP-style models from a store of precomputed teacher features.",
)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(store_app, name="store")
app.add_typer(study_app, name="study")
app.add_typer(list_app, name="list")

UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer Typers carry inside
EXIT_INTERRUPTED = 130
_terminated: list[int] = []


def main() -> None:
    """Run the command line; the entry point of the `kdstore` script."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(_run())
    except Interrupted as e:
        say(f"interrupted: {e}")
        sys.exit(128 + e.signum)
    except KdstoreError as e:
        say(f"error: {e}")
        sys.exit(1)
    except UsageError as e:
        say(f"error: {sentence(e.format_message())} See {e.ctx.command_path if e.ctx else 'kdstore'} --help.")
        sys.exit(2 if e.ctx and e.ctx.command_path == "kdstore store verify" else 1)  # 1 says there that a store is damaged
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        signal.signal(signal.SIGTERM, before)
        _terminated.clear()


def _terminate(signum: int, frame: object) -> None:
    """End as Ctrl-C does, leaving nothing half-written, when a cluster takes the machine back."""
    _terminated.append(signum)
    raise KeyboardInterrupt


def _run() -> int | None:
    """Run the command and return the code of its typer.Exit, if any; raises Interrupted for Ctrl-C, which Typers tell in three ways."""
    try:
        code: int | None = app(sys.argv[1:] or ["--help"], prog_name="kdstore", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        raise Interrupted("Stopped; what is on disk is whole.", signum=_terminated[0] if _terminated else signal.SIGINT)
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
    parent: Annotated[
        str | None, typer.Option(help="Add arrays to the rows of this store, in a store beside it: its embeddings are not computed again.")
    ] = None,
    keys: Annotated[str | None, typer.Option(metavar="FILE", help="Of the parent's rows those with these keys, one per line.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token features to keep: none, image, text or both.")] = None,
    token_layer: Annotated[str | None, typer.Option(help="last, last-before-norm, or the number of a block (-1 the last).")] = None,
    reduce: Annotated[str | None, typer.Option(metavar="CODEC", help="Codec of tokens, such as pool7+pq64; see 'kdstore list codecs'.")] = None,
    encode: Annotated[str | None, typer.Option(metavar="CODEC", help="Codec of embeddings, such as int8 or pca256+int8.")] = None,
    views: Annotated[int | None, typer.Option(metavar="K", help="Augmented views of each image to embed beside the plain one (docs/views.md).")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Compile the towers with torch.compile.")] = None,
    channels_last: Annotated[bool | None, typer.Option("--channels-last", help="Lay images out channels last, as convolutions on GPUs like it.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine, one for a GPU or a few cores; 0: none but this one.")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="TCP://HOST:PORT", help="The scheduler of a dask cluster whose workers do the work.")] = None,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="For job arrays: only the I-th of N parts; then 'kdstore store finalise'.")] = None,
    unit_rows: Annotated[int | None, typer.Option(help="Rows that are written, and resumed, at once.")] = None,
    device: Device = None,
    dry_run: Annotated[bool | None, typer.Option("--dry-run", help="Tell rows, bytes, files and hours from a short calibration, and write nothing.")] = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Run a teacher once over the data and write its features to a store; run again to resume."""
    from kdstore.extract.config import ExtractConfig

    options = {"teacher": teacher, "pretrained": pretrained, "data": data, "out": out, "tokens": tokens, "unit_rows": unit_rows, "device": device}
    cluster = {"workers": workers, "scheduler": scheduler, "part": part}
    rows = {"parent": parent, "keys": keys, "views": views}
    forward = {"token_layer": token_layer, "precision": precision, "compile": compile, "channels_last": channels_last, "reduce": reduce, "encode": encode}
    config = config_of(ExtractConfig, "extract", recipe, settings, options | cluster | rows | forward)
    if config.data is None and config.parent is None:
        say("notice: no --data, so the built-in scenes are used.")
    from kdstore.extract import estimate, run

    with bars() as on_progress:
        result = estimate.estimate(config, on_progress=on_progress) if dry_run else run.extract(config, on_progress=on_progress)
    show(result, as_json)


@app.command()
def distill(
    cache: Annotated[
        list[str] | None,
        typer.Option(help="The store of a teacher's features (folder or address), once for each teacher; without one, the student learns alone."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A teacher that runs beside the student instead of a store, as in 'kdstore extract'.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Its tag or checkpoint file.")] = None,
    data: Data = None,
    student: Annotated[str | None, typer.Option(help="See 'kdstore list students'; any open_clip architecture or config.json too.")] = None,
    init: Annotated[str | None, typer.Option(help="First weights: scratch, a run folder, a file or tag, inherit[:MODEL] (docs/students.md).")] = None,
    text_tower: Annotated[str | None, typer.Option(help="own, copied (starts as the teacher's), or frozen (the cached embeddings stand for it).")] = None,
    loss: Annotated[str | None, typer.Option(help="See 'kdstore list losses'; sums like 'clip + 1*crd' too.")] = None,
    out: Annotated[str | None, typer.Option(help="The run folder.")] = None,
    samples: Annotated[int | None, typer.Option(help="Image-caption pairs to see in all.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs in a batch, of all processes together.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Pairs that are encoded at once, where a batch does not fit (docs/training.md).")] = None,
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
    options |= {"init": init, "text_tower": text_tower, "micro_batch": micro_batch, "teacher": teacher, "pretrained": pretrained}
    config = config_of(DistillConfig, "distill", recipe, settings, {**options, "seed": seed, "resume": resume, "device": device})
    from kdstore.distill import train

    with bars() as on_progress:
        result = train.distill(config, on_progress=on_progress)
    show(result, as_json)


@app.command()
def demo(
    out: Annotated[str | None, typer.Option(help="Folder of everything that the demo makes.")] = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on the built-in scenes: extract, distil, fine-tune, score, one table and report.html."""
    from kdstore.demo.config import DemoConfig

    config = config_of(DemoConfig, "demo", recipe, settings, {"out": out})
    from kdstore.demo import run
    from kdstore.demo.report import table_as_markdown

    with bars() as on_progress:
        result = run.run_demo(config, on_progress=on_progress)
    show(result.content, as_json, text=f"{table_as_markdown(result.content)}\nReport: {result.report}")
