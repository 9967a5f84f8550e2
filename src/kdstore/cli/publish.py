"""Commands of `kdstore store` for those who publish a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kdstore.cli.options import Data, Json
from kdstore.cli.screen import bars, say, show
from kdstore.errors import ConfigError


def sign(
    path: Path, key: Annotated[Path, typer.Option(help="A private SSH key, or the public one of a key that an agent holds.")], as_json: Json = False
) -> None:
    """Sign a store's digest with an SSH key; written to manifest.json.sig."""
    from kdstore import store

    signature = store.sign_store(path, key)
    show({"path": str(signature), "digest": store.open_store(path).digest}, as_json)


def card(
    path: Path,
    licence: Annotated[str | None, typer.Option(help="Of the features: an identifier that the Hub knows, such as cc-by-4.0, or a link.")] = None,
    teacher_licence: Annotated[str | None, typer.Option(help="Of the teacher's weights, in words.")] = None,
    source_licence: Annotated[str | None, typer.Option(help="Of images and captions, in words.")] = None,
    citation: Annotated[Path | None, typer.Option(metavar="FILE", help="What to cite, as BibTeX.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: that of the folder.")] = None,
    mirror: Annotated[list[str] | None, typer.Option(help="Address of a copy; may be given again.")] = None,
    as_json: Json = False,
) -> None:
    """Write README.md, with the header that the Hub reads, and croissant.json beside a store's manifest."""
    from kdstore.store.card import CardConfig, write_card

    try:
        cited = None if citation is None else citation.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"Cannot read {citation}: {getattr(e, 'strerror', None) or e}.", "Give a text file with BibTeX.") from e
    licences = {"licence": licence, "teacher_licence": teacher_licence, "source_licence": source_licence}
    made = write_card(path, CardConfig(**licences, citation=cited, name=name, mirrors=tuple(mirror or ())))
    for notice in made.notices:
        say(f"notice: {notice}")
    show(made, as_json)


def withdraw(
    path: Path,
    out: Annotated[Path, typer.Option(help="The new version of the store.")],
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="A text file with the key of an image per line.")] = None,
    sha256: Annotated[Path | None, typer.Option(metavar="FILE", help="A text file with the sha256 of an encoded image per line.")] = None,
    parent: Annotated[Path | None, typer.Option(help="For arrays of another store's rows: the new version of that one.")] = None,
    as_json: Json = False,
) -> None:
    """Write a version of a store without some images, their features, keys and captions; run again to resume."""
    from kdstore import store

    if keys is None and sha256 is None:
        raise ConfigError("Nothing to withdraw: no list of images is given.", "Give --keys FILE or --sha256 FILE.")
    listed = {"keys": [] if keys is None else store.read_keys(keys), "sha256": [] if sha256 is None else store.read_keys(sha256)}
    with bars() as on_progress:
        made = store.withdraw_rows(path, out, **listed, parent=parent, on_progress=on_progress)
    show(made, as_json)


def import_features(
    folder: Path,
    out: Annotated[Path, typer.Option(help="The new store.")],
    format: Annotated[str, typer.Option(help="clip-retrieval, datacompdr, theia or npy.")],
    teacher: Annotated[str | None, typer.Option(help="Name of the teacher; default: unknown.")] = None,
    logit_scale: Annotated[float | None, typer.Option(help="The teacher's, exponentiated; default: unknown.")] = None,
    logit_bias: Annotated[str | None, typer.Option(help="The teacher's, or none if it was trained with a softmax; default: unknown.")] = None,
    key: Annotated[str | None, typer.Option(metavar="FIELD", help="Column or json field with the keys; default: image_path, or uid.")] = None,
    sha256: Annotated[str | None, typer.Option(metavar="FIELD", help="Column or json field with the sha256 of the encoded image; default: unknown.")] = None,
    data: Data = None,
    augmentation: Annotated[str, typer.Option(help="Of datacompdr: the number of the augmented view, or mean.")] = "mean",
    embedding: Annotated[str | None, typer.Option(help="Of theia: the tensor that is the image's embedding.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    unit_rows: Annotated[int, typer.Option(help="Rows that are written, and resumed, at once.")] = 16_384,
    max_invalid: Annotated[float, typer.Option(help="Share of images that may have no finite features.")] = 0.1,
    as_json: Json = False,
) -> None:
    """Write features that others computed as a store; run again to resume. What the folder does not say is marked unknown."""
    from kdstore.data.sources import open_source
    from kdstore.store.importing import ImportConfig, import_store

    try:
        bias: float | str | None = logit_bias if logit_bias in (None, "none") else float(logit_bias)
    except ValueError as e:
        raise ConfigError(f"'{logit_bias}' is no logit bias.", "Give a number, or none for a teacher that was trained with a softmax.") from e
    said = {"teacher": teacher, "logit_scale": logit_scale, "logit_bias": bias, "key": key, "sha256": sha256, "augmentation": augmentation}
    config = ImportConfig(format=format, **said, embedding=embedding, dtype=dtype, unit_rows=unit_rows, max_invalid=max_invalid)  # type: ignore[arg-type]
    read_torch: Callable[[bytes], Any] | None = None
    if format == "datacompdr":
        from kdstore.extract.torchfile import read_tensors

        read_torch = read_tensors
    with bars() as on_progress:
        made = import_store(folder, out, config, source=None if data is None else open_source(data), read_torch=read_torch, on_progress=on_progress)
    show(made, as_json)
