"""Commands of `kdstore store` for those who publish a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdstore.cli.options import Json
from kdstore.cli.screen import bars, show
from kdstore.errors import ConfigError


def sign(
    path: Path, key: Annotated[Path, typer.Option(help="A private SSH key, or the public one of a key that an agent holds.")], as_json: Json = False
) -> None:
    """Sign a store's digest with an SSH key; written to manifest.json.sig."""
    from kdstore import store

    signature = store.sign_store(path, key)
    show({"path": str(signature), "digest": store.open_store(path).digest}, as_json)


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
