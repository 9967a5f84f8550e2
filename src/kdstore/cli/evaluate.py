"""`kdstore evaluate ...`: score a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdstore.cli.options import Data, Device, Json, ModelOption, Out, Pretrained, Recipe, Seed, Settings, config_of
from kdstore.cli.screen import bars, show

evaluate_app = typer.Typer(rich_markup_mode=None, help="Score a model: visual question answering, zero-shot, retrieval, probes, agreement; compare results.")

ScoredStore = Annotated[str | None, typer.Option("--cache", help="The store of a teacher's features, in place of its weights.")]
LabelledData = Annotated[str | None, typer.Option("--data", help="A folder of class folders, scenes/test?probe=LABEL, or a source with ?probe=COLUMN.")]
ClassNames = Annotated[str | None, typer.Option(help="A file with a name per line, or a set: imagenet, cifar10, stl10, digits.")]


@evaluate_app.command("vqa")
def evaluate_vqa(
    model: ModelOption = None,
    pretrained: Annotated[str | None, typer.Option(help="A tag or a checkpoint file.")] = None,
    features: Annotated[list[str] | None, typer.Option(metavar="STORE", help="Stores of a model's image features, instead of --model.")] = None,
    mode: Annotated[str | None, typer.Option(help="frozen, head+last-K or full: what is trained beside the head.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels of the images, with positions interpolated.")] = None,
    dataset: Annotated[str | None, typer.Option(help="See 'kdstore list vqa'.")] = None,
    folder: Annotated[str | None, typer.Option("--data-dir", help="Folder of the data set's files.")] = None,
    split: Annotated[str | None, typer.Option(help="The split whose questions are scored.")] = None,
    metric_version: Annotated[str | None, typer.Option(help="Another behaviour of the data set's metric than the default.")] = None,
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

    options: dict[str, Any] = {"model": model, "pretrained": pretrained, "dataset": dataset, "folder": folder, "eval_split": split, "head": head}
    options |= {"question_encoder": question_encoder, "features": features or None, "mode": mode, "image_size": image_size, "metric_version": metric_version}
    config = config_of(VqaConfig, "vqa", recipe, settings, {**options, "controls": controls, "out": out, "seeds": parse_seeds(seeds), "device": device})
    from kdstore.evaluate import vqa

    with bars() as on_progress:
        result = vqa.evaluate_vqa(config, on_progress=on_progress)
    _show_table(result.content, as_json)


@evaluate_app.command("score")
def evaluate_score(
    dataset: Annotated[str | None, typer.Option(help="See 'kdstore list vqa', or hf:ORG/NAME.")] = None,
    folder: Annotated[str | None, typer.Option("--data-dir", help="Folder of the data set's files.")] = None,
    split: Annotated[str | None, typer.Option(help="Whose answers are public; default: val, or what the data set has in its place.")] = None,
    predictions: Annotated[str | None, typer.Option(help="File as the data set's own evaluator takes it.")] = None,
    metric: Annotated[str | None, typer.Option(help="Another metric than the data set's own.")] = None,
    metric_version: Annotated[str | None, typer.Option(help="Another behaviour of it than the default.")] = None,
    out: Out = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Score a file of predictions by the data set's metric; no model is needed."""
    from kdstore.evaluate.protocol import ScoreConfig

    options = {"dataset": dataset, "folder": folder, "split": split, "predictions": predictions, "metric": metric, "metric_version": metric_version, "out": out}
    config = config_of(ScoreConfig, "score", recipe, settings, options)
    from kdstore.evaluate import score

    with bars() as on_progress:
        content = score.evaluate_score(config, on_progress=on_progress)
    _show_table(content, as_json)


@evaluate_app.command("zeroshot")
def evaluate_zeroshot(
    model: ModelOption = None,
    pretrained: Pretrained = None,
    cache: ScoredStore = None,
    data: LabelledData = None,
    classnames: ClassNames = None,
    templates: Annotated[str | None, typer.Option(help="A file with a template per line, {} for the name, or a set: photo (default), imagenet, ...")] = None,
    out: Out = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Classify images by the names of their classes in templates: acc1, acc5, mean recall per class, or the mean average precision of several labels."""
    from kdstore.evaluate.protocol import ZeroshotConfig

    options = {"model": model, "pretrained": pretrained, "cache": cache, "data": data, "classnames": classnames, "templates": templates}
    config = config_of(ZeroshotConfig, "zeroshot", recipe, settings, options | {"out": out, "device": device})
    from kdstore.evaluate import zeroshot

    with bars() as on_progress:
        result = zeroshot.evaluate_zeroshot(config, on_progress=on_progress)
    _show_table(result.content, as_json)


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    model: ModelOption = None,
    pretrained: Pretrained = None,
    cache: ScoredStore = None,
    data: Data = None,
    index: Annotated[str | None, typer.Option(help="exact (default), or lists: approximate, for large sets.")] = None,
    out: Out = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Measure recall at 1, 5 and 10 of images by their captions and back, beside what repeated captions allow."""
    from kdstore.evaluate.protocol import RetrievalConfig

    options = {"model": model, "pretrained": pretrained, "cache": cache, "data": data, "index": index, "out": out, "device": device}
    config = config_of(RetrievalConfig, "retrieval", recipe, settings, options)
    from kdstore.evaluate import retrieval

    with bars() as on_progress:
        result = retrieval.evaluate_retrieval(config, on_progress=on_progress)
    _show_table(result.content, as_json)


@evaluate_app.command("probe")
def evaluate_probe(
    model: ModelOption = None,
    pretrained: Pretrained = None,
    train_data: Annotated[str | None, typer.Option(help="Labelled images to train on.")] = None,
    data: LabelledData = None,
    train_cache: Annotated[str | None, typer.Option(help="In place of a model: the store of the training images.")] = None,
    cache: ScoredStore = None,
    classnames: ClassNames = None,
    neighbours: Annotated[int | None, typer.Option(metavar="K", help="Nearest training images that vote.")] = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train a linear probe and let the nearest neighbours vote, on frozen image embeddings."""
    from kdstore.evaluate.protocol import ProbeConfig

    options: dict[str, Any] = {"model": model, "pretrained": pretrained, "train_data": train_data, "data": data, "train_cache": train_cache, "cache": cache}
    options |= {"classnames": classnames, "neighbours": neighbours, "out": out, "seed": seed, "device": device}
    config = config_of(ProbeConfig, "probe", recipe, settings, options)
    from kdstore.evaluate import probe

    with bars() as on_progress:
        result = probe.evaluate_probe(config, on_progress=on_progress)
    _show_table(result.content, as_json)


@evaluate_app.command("agreement")
def evaluate_agreement(
    model: Annotated[list[str] | None, typer.Option(help="A run folder, ARCH[:TAG], hf-hub:ORG/NAME, ...; the student first.")] = None,
    cache: Annotated[list[str] | None, typer.Option(help="The store of a teacher's features.")] = None,
    data: Data = None,
    samples: Annotated[int | None, typer.Option(help="Images that every measure is taken on.")] = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = None,
    recipe: Recipe = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Compare a student with its teacher: --model RUN --cache STORE, two models or two stores (docs/evaluation.md has the measures)."""
    from kdstore.evaluate.protocol import AgreementConfig

    options = {"model": model or None, "cache": cache or None, "data": data, "samples": samples, "out": out, "seed": seed, "device": device}
    config = config_of(AgreementConfig, "agreement", recipe, settings, options)
    from kdstore.evaluate import agreement

    with bars() as on_progress:
        result = agreement.evaluate_agreement(config, on_progress=on_progress)
    show(result.content, as_json, text=agreement.measures_as_text(result.rows))


@evaluate_app.command("compare")
def evaluate_compare(
    a: Annotated[str, typer.Argument(help="A result file.")],
    b: Annotated[str, typer.Argument(help="Another, of the same questions; or the same, with another row.")],
    row_a: Annotated[str, typer.Option(help="The row of A.")] = "model",
    row_b: Annotated[str, typer.Option(help="The row of B.")] = "model",
    out: Annotated[str | None, typer.Option(help="File of the comparison.")] = None,
    page: Annotated[str | None, typer.Option(help="HTML file of questions that one alone answers right, with their images.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Questions on the page, at most, for each of the two.")] = 60,
    folder: Annotated[str | None, typer.Option("--data-dir", help="Folder of the data set's files, for the page, if they moved.")] = None,
    as_json: Json = False,
) -> None:
    """Say how far two results on the same questions are apart, per kind of question, and how sure that is (docs/comparing.md)."""
    from kdstore.evaluate import compare

    with bars() as on_progress:
        content = compare.compare(a, b, row_a=row_a, row_b=row_b, out=out, page=page, examples=examples, folder=folder, on_progress=on_progress)
    show(content, as_json, text=compare.comparison_table(content))


@evaluate_app.command("table")
def evaluate_table(
    files: Annotated[list[str], typer.Argument(help="Result files of one kind of evaluation.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV in full precision, with where each row comes from, instead of Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Put results side by side in one table, with 95 % intervals (docs/comparing.md)."""
    from kdstore.evaluate.results import read_result
    from kdstore.evaluate.tables import csv_table, markdown_table, table_rows

    results = [read_result(path) for path in files]
    show(table_rows(results) if as_json else {}, as_json, text=csv_table(results) if as_csv else markdown_table(results))


def _show_table(content: dict[str, Any], as_json: bool) -> None:
    from kdstore.evaluate.tables import markdown_table

    show(content, as_json, text=markdown_table([content]))
