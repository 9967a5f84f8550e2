"""`kdstore evaluate ...`: score a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdstore.cli.options import Data, Device, Json, ModelOption, Recipe, Settings, config_of
from kdstore.cli.screen import bars, show

evaluate_app = typer.Typer(rich_markup_mode=None, help="Score a model: visual question answering, retrieval.")


@evaluate_app.command("vqa")
def evaluate_vqa(
    model: ModelOption = None,
    pretrained: Annotated[str | None, typer.Option(help="A tag or a checkpoint file.")] = None,
    features: Annotated[list[str] | None, typer.Option(metavar="STORE", help="Stores of a model's image features, instead of --model.")] = None,
    mode: Annotated[str | None, typer.Option(help="frozen, head+last-K or full: what is trained beside the head.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels of the images, with positions interpolated.")] = None,
    dataset: Annotated[str | None, typer.Option(help="See 'kdstore list vqa'.")] = None,
    folder: Annotated[str | None, typer.Option("--data-dir", help="Folder of the data set's files.")] = None,
    head: Annotated[str | None, typer.Option(help="coattention, butd, or pooled (a weak baseline).")] = None,
    question_encoder: Annotated[str | None, typer.Option(help="scratch, or own-text-tower (a second protocol).")] = None,
    controls: Annotated[bool | None, typer.Option("--controls/--no-controls", help="Rows question-only, untrained, vocabulary-oracle.")] = None,
    out: Annotated[str | None, typer.Option(help="Result file; what is finished, and checkpoints, are kept in OUT.rows beside it.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of heads and untrained weights, such as 0,1,2.")] = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train a head on image tokens, by --mode with the image tower, and score its answers by the data set's metric; run again to go on."""
    from kdstore.evaluate.protocol import VqaConfig, parse_seeds

    options: dict[str, Any] = {"model": model, "pretrained": pretrained, "dataset": dataset, "folder": folder, "head": head}
    options |= {"question_encoder": question_encoder, "features": features or None, "mode": mode, "image_size": image_size}
    config = config_of(VqaConfig, "vqa", recipe, settings, {**options, "controls": controls, "out": out, "seeds": parse_seeds(seeds), "device": device})
    from kdstore.evaluate import vqa
    from kdstore.evaluate.results import markdown_table

    with bars() as on_progress:
        result = vqa.evaluate_vqa(config, on_progress=on_progress)
    show(result.content, as_json, text=markdown_table([result.content]))


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
    config = config_of(retrieval.RetrievalConfig, "retrieval", recipe, settings, options)
    with bars() as on_progress:
        result = retrieval.evaluate_retrieval(config, on_progress=on_progress)
    show(result.content, as_json, text=markdown_table([result.content]))
