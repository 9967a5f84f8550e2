"""The import: plan the rows of a folder of features, stream them through the store's own writer, seal.

Nothing is invented: what the folder and the user do not say of the teacher is listed as unknown in the identity. Rows without finite features keep their
row and are not valid, as in an extraction, and are counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.data.columns import well_formed
from kdstore.data.source import Caption, Source
from kdstore.errors import JoinError, SourceError, StoreError, UnknownName
from kdstore.jsonfile import digest_of
from kdstore.progress import OnProgress, silent
from kdstore.store.attempt import Attempt
from kdstore.store.importing.config import ImportConfig
from kdstore.store.importing.datacompdr import datacompdr
from kdstore.store.importing.foreign import Arrays
from kdstore.store.importing.found import Found, Pair
from kdstore.store.importing.npy import clip_retrieval, plain
from kdstore.store.importing.theia import theia
from kdstore.store.layout import ArraySpec, embedding_array, token_array
from kdstore.store.plan import Plan, Side, Unit
from kdstore.store.reader import open_store
from kdstore.store.writer import StoreWriter, check_place

BATCH_VALUES = 1 << 21
BAD_VALUES = "its features are no finite numbers of the stored type"
UNKNOWN_OF_TEACHER = ("config", "activation", "weights_sha256", "logit_scale", "logit_bias")
UNKNOWN = ("preprocessing", "tokenizer", "decoding")


@dataclass(frozen=True)
class Imported:
    """A store of imported features; `invalid_images` and `invalid_texts` had no finite ones, `unknown` is what neither folder nor user said."""

    path: str
    digest: str
    images: int
    texts: int
    arrays: dict[str, str]
    invalid_images: int
    invalid_texts: int
    unknown: tuple[str, ...]
    bytes: int


def import_store(
    folder: str | Path,
    out: str | Path,
    config: ImportConfig,
    *,
    source: Source | None = None,
    read_torch: Callable[[bytes], Arrays] | None = None,
    on_progress: OnProgress = silent,
) -> Imported:
    """Write the features in a folder as a store, or go on with one.

    `source` tells captions by key where the folder has none. `read_torch` reads a torch file without unpickling objects (the store knows no torch). Raises
    UnknownName, ConfigError, SourceError for a folder that is not of the format or not whole, for keys that come twice and for too many rows without finite
    features; JoinError for a source without these keys; and what `StoreWriter` raises.
    """
    if config.format not in IMPORTS:
        raise UnknownName.of("format", config.format, IMPORTS)
    if not Path(folder).exists():
        raise SourceError(f"There is no {folder}.", "Check the path.")
    check_place(Path(out))
    started = time.perf_counter()
    found = IMPORTS[config.format](Path(folder), config, read_torch)
    for notice in found.notices:
        on_progress("notice", 0, 0, notice)
    plan = Plan.freeze(_counted(found.pairs() if source is None else _with_captions(found, source), on_progress), unit_rows=config.unit_rows)
    if not plan.num_images:
        raise SourceError(f"{folder} holds no row.", "Name another folder.")
    identity = _identity(found, config, plan)
    with StoreWriter.open(out, plan=plan, arrays=_specs(found, config, plan), identity=identity, on_progress=on_progress) as writer:
        pending = writer.pending()
        total = sum(len(unit) for unit in pending)
        done = 0
        for unit in pending:
            with writer.attempt(unit) as attempt:
                for rows in _fill(attempt, unit, found, writer.arrays):
                    done += rows
                    on_progress("import: rows", done, total, unit.name)
        invalid = {} if writer.complete else _refuse_invalid(writer, config.max_invalid)
        run = {"operation": "import", "format": config.format, "settings": asdict(config), "seconds": round(time.perf_counter() - started, 3), **invalid}
        digest = writer.finalise(run | ({} if source is None else {"source": source.spec}))
    store = open_store(out)
    counts = {f"invalid_{side}s": int((~valid).sum()) for side, valid in (("image", store.image_valid), ("text", store.text_valid))}
    if any(counts.values()):
        on_progress("warning", 0, 0, f"{counts['invalid_images']} images and {counts['invalid_texts']} texts are not valid: {BAD_VALUES}.")
    arrays = {name: f"{list(spec.shape)} {spec.dtype}" for name, spec in store.arrays.items()}
    unknown = (*(f"teacher.{name}" for name in identity["teacher"]["unknown"]), *identity["unknown"])
    return Imported(str(out), digest, plan.num_images, plan.num_texts, arrays, **counts, unknown=unknown, bytes=store.num_bytes)


def _identity(found: Found, config: ImportConfig, plan: Plan) -> dict[str, Any]:
    said: dict[str, Any] = {"name": config.teacher, "imported": {"format": config.format, **found.says}}
    said["embed_dim"] = found.shapes.get("image/embedding", found.shapes.get("text/embedding", (None,)))[0]
    if config.logit_scale is not None:
        said["logit_scale"] = config.logit_scale
    if config.logit_bias is not None:
        said["logit_bias"] = None if config.logit_bias == "none" else config.logit_bias
    teacher = {**said, "unknown": [name for name in UNKNOWN_OF_TEACHER if name not in said]}
    return {
        "teacher": {**teacher, "digest": digest_of({name: part for name, part in teacher.items() if name != "name"})},
        "unknown": list(UNKNOWN),
        "source": {"fingerprint": plan.fingerprint},
        "arrays": found.encoding,
    }


def _specs(found: Found, config: ImportConfig, plan: Plan) -> list[ArraySpec]:
    """Describe the arrays; raises SourceError for shapes that a store cannot hold."""
    specs = []
    for name, shape in found.shapes.items():
        side: Side = "image" if name.startswith("image/") else "text"
        spec = (embedding_array if len(shape) == 1 else token_array)(plan, side, *shape, dtype=config.dtype)
        try:
            specs.append(ArraySpec.from_metadata(name, spec.to_metadata()))
        except StoreError as e:
            raise SourceError(f"{name} has rows of {list(shape)}, which no store can hold.", "Check the folder.") from e
    return specs


def _fill(attempt: Attempt, unit: Unit, found: Found, specs: tuple[ArraySpec, ...]) -> Iterator[int]:
    """Append all rows of a unit, yielding how many after each batch."""
    arrays = {spec.name: spec for spec in specs if spec.side == unit.side and spec.name in found.shapes}
    step = max(1, BATCH_VALUES // max(1, sum(math.prod(found.shapes[name]) for name in arrays)))
    for start in range(unit.start, unit.stop, step):
        stop = min(start + step, unit.stop)
        rows = found.read(unit.side, start, stop) if arrays else {}
        cast, valid = {}, np.ones(stop - start, bool)
        for name, spec in arrays.items():
            with np.errstate(over="ignore"):
                cast[name] = rows[name].astype(spec.dtype)
            valid &= np.isfinite(cast[name]).reshape(stop - start, -1).all(axis=1)
        for name, values in cast.items():
            values[~valid] = np.nan
            attempt.append(name, values[:, None] if arrays[name].has_views else values)
        attempt.index(_index_rows(unit, valid, found.sha256(start, stop) if unit.side == "image" else []))
        yield stop - start


def _index_rows(unit: Unit, valid: npt.NDArray[np.bool_], sha256: list[str]) -> list[dict[str, Any]]:
    if unit.side == "text":
        return [{"valid": ok} for ok in valid.tolist()]
    sized = {"width": 0, "height": 0}
    return [{"sha256": text, "valid": ok, "reason": "" if ok else BAD_VALUES, **sized} for text, ok in zip(sha256, valid.tolist(), strict=True)]


def _refuse_invalid(writer: StoreWriter, max_invalid: float) -> dict[str, int]:
    """Count images that are not valid; raises SourceError if they are too many."""
    images, invalid = writer.recorded("image")
    if invalid > max_invalid * images:
        found = f"{invalid} of {images} images have no finite features; {100 * max_invalid:.3g} % may be so."
        raise SourceError(found, "Check the folder, try --dtype float32, or raise --max-invalid.")
    return {"invalid_images": invalid}


def _with_captions(found: Found, source: Source) -> Iterator[Pair]:
    """Yield the pairs of a folder, those without a caption with those that a source has for their key; raises JoinError if it has none of the keys."""
    place = {source.key(i): i for i in range(len(source))}
    matched = False
    for key, captions in found.pairs():
        row = place.get(key)
        matched |= row is not None
        if not captions and row is not None:
            if "text/embedding" in found.shapes:
                raise JoinError(f"'{key}' has no caption in the folder, and its text embeddings are those of captions.", "Leave --data out.")
            captions = source.captions(row)
        yield key, captions
    if not matched:
        raise JoinError(f"{source.spec} has none of the keys of the folder.", "Name the data that the features are of, or another --key.")


def _counted(pairs: Iterator[Pair], on_progress: OnProgress) -> Iterator[Pair]:
    for count, (key, captions) in enumerate(pairs, 1):
        if not key:
            raise SourceError(f"Image {count - 1} has an empty key.", "Name another --key.")
        yield well_formed(key), tuple(Caption(well_formed(caption.text), caption.kind) for caption in captions)
        if count % 65_536 == 0:
            on_progress("plan", count, count + 1, "")


IMPORTS: dict[str, Callable[[Path, ImportConfig, Any], Found]] = {
    "clip-retrieval": clip_retrieval,
    "datacompdr": datacompdr,
    "npy": plain,
    "theia": theia,
}
