"""The extraction: plan, check the teacher, write units of images and texts, seal.

A unit is all or nothing, so an interrupted run is resumed by running it again: units that are recorded are skipped. Batches never
cross units, so a resumed run computes the same numbers as one that was never stopped.
"""

from __future__ import annotations

import datetime
import platform
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch

from kdstore import __version__
from kdstore.data.images import DECODING, reason_of
from kdstore.data.source import Source, UndecodableImage
from kdstore.data.sources import open_source
from kdstore.errors import ConfigError, DiskFull, SourceError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import chains_of, encoded, fit_codecs, image_features, kept_codecs, sampled
from kdstore.extract.parent import RowsOfStore
from kdstore.metrics.retrieval import retrieval_recall
from kdstore.models.encode import encode_image, encode_text, encode_text_tokens, image_token_form, in_batches, text_token_form
from kdstore.models.load import Model, load_model
from kdstore.models.memory import Fitting
from kdstore.models.names import resolve
from kdstore.progress import OnProgress, silent
from kdstore.store import (
    ArraySpec,
    Attempt,
    Codec,
    Plan,
    Store,
    StoreWriter,
    Unit,
    child_identity,
    codec_files,
    codec_identity,
    embedding_array,
    open_store,
    plan_child,
    read_keys,
    scalar_array,
    token_array,
)
from kdstore.store.plan import Side

CHECKED_PAIRS = 64  # pairs of the sanity check
LONG_RUN = 512  # images from which the check is worth its time


@dataclass(frozen=True)
class ExtractResult:
    """A finished extraction: where, which bytes, how much, how fast; `notices` are for the user to read."""

    path: str
    digest: str
    teacher: str
    images: int
    texts: int
    invalid_images: int
    written_images: int
    seconds: float
    images_per_second: float
    notices: tuple[str, ...]


@dataclass
class _Run:
    """What the writing of every unit shares, and what it has counted so far."""

    config: ExtractConfig
    source: Source
    plan: Plan
    model: Model
    specs: dict[str, ArraySpec]
    codecs: dict[str, Codec]
    totals: dict[str, int]
    pool: ThreadPoolExecutor
    fitting: Fitting
    on_progress: OnProgress
    earlier_images: int  # recorded before this process
    invalid: int  # of those and of this process's
    images: int = 0
    texts: int = 0


def extract(config: ExtractConfig, *, source: Source | None = None, on_progress: OnProgress = silent) -> ExtractResult:
    """Run a teacher over a source into a store, resuming what an earlier run recorded.

    Raises ModelError, SourceError, IdentityMismatch, StoreLocked, DiskFull; the store stays as the last recorded unit left it.
    """
    parent = open_store(config.parent) if config.parent else None
    source = source or open_source(config.data or (parent.recorded_source if parent else "scenes"), on_progress=on_progress)
    seed = config.untrained_seed
    name = resolve(config.teacher, config.pretrained, untrained=seed is not None)
    notices = [*source.notices, *([name.notice] if name.notice else [])]
    for notice in notices:
        on_progress("notice", 0, 0, notice)  # before the weights are fetched
    on_progress("load", 0, 1, config.teacher)
    options: dict[str, Any] = {"device": config.device, "precision": config.precision, "compile": config.compile, "channels_last": config.channels_last}
    model = load_model(config.teacher, config.pretrained, untrained=seed is not None, seed=seed or 0, **options)
    on_progress("load", 1, 1, config.teacher)
    out = Path(config.out or f"store/{name.short}")
    on_progress("plan", 0, len(source), source.spec)
    if parent is None:
        plan = Plan.freeze(((source.key(i), source.captions(i)) for i in range(len(source))), unit_rows=config.unit_rows)
    else:
        if held := sorted(feature_shapes(config, model).keys() & parent.arrays.keys()):
            raise ConfigError(f"{parent.path} holds {' and '.join(held)} already.", "Ask for other --tokens, or make a store without --parent.")
        rows, plan = plan_child(parent, read_keys(config.keys) if config.keys else None, config.unit_rows)
        source = RowsOfStore(parent, rows, plan, source)
    if plan.num_texts == 0:
        raise SourceError(f"{source.spec} has no caption.", "Name the caption column, or give other data.")
    on_progress("plan", len(source), len(source), source.spec)
    arrays = planned_arrays(config, model, plan)
    _check_space(out, plan, arrays)
    started = time.perf_counter()
    fitting = Fitting(lambda notice: _say(notices, on_progress, notice))
    codecs = _codecs(out, config, source, plan, model, fitting, on_progress)
    constants = {path: content for name, codec in codecs.items() for path, content in codec_files(name, codec).items()}
    identity = store_identity(config, model, plan, codecs)
    if parent is not None:
        identity = child_identity(parent, identity)
    with StoreWriter.open(out, plan=plan, arrays=arrays, identity=identity, constants=constants, on_progress=on_progress) as writer:
        pending = writer.pending()
        check = _check_teacher(model, source, config.batch, fitting) if parent is None and pending and plan.num_images >= LONG_RUN else None
        if check is not None and check["warning"]:
            _say(notices, on_progress, check["warning"], "warning")
        with ThreadPoolExecutor(config.threads) as pool:
            totals = {side: sum(len(u) for u in pending if u.side == side) for side in ("image", "text")}
            earlier, valid = writer.recorded_images()
            specs = {spec.name: spec for spec in arrays}
            run = _Run(config, source, plan, model, specs, codecs, totals, pool, fitting, on_progress, earlier_images=earlier, invalid=earlier - valid)
            for unit in pending:
                with writer.attempt(unit) as attempt:
                    (_write_images if unit.side == "image" else _write_texts)(run, attempt, unit)
        seconds = time.perf_counter() - started
        digest = writer.finalise(_account(run, seconds, check, resumed=len(pending) < len(plan.units)))
    if run.invalid:
        said = f"{run.invalid} of {plan.num_images} images cannot be decoded; their rows are NaN, and the store's index says why."
        _say(notices, on_progress, said, "warning")
    if repeated := _repeated_content(open_store(out), plan):
        _say(notices, on_progress, f"{repeated} of {plan.num_images} images have the content of another under another key.")
    return ExtractResult(
        path=str(out),
        digest=digest,
        teacher=model.identity["teacher"]["name"],
        images=plan.num_images,
        texts=plan.num_texts,
        invalid_images=run.invalid,
        written_images=run.images,
        seconds=round(seconds, 3),
        images_per_second=round(run.images / seconds, 2),
        notices=tuple(notices),
    )


def _say(notices: list[str], on_progress: OnProgress, notice: str, stage: str = "notice") -> None:
    notices.append(notice)
    on_progress(stage, 0, 0, notice)


def _repeated_content(store: Store, plan: Plan) -> int:
    """Count the images whose encoded bytes are those of another, by 64 bits of their hashes."""
    columns = (store.index("image", "sha256", slice(unit.number, unit.number + 1)) for unit in plan.units if unit.side == "image")
    hashes = np.concatenate([np.array([int(text[:16], 16) for text in column.to_pylist() if text], np.uint64) for column in columns])
    return len(hashes) - len(np.unique(hashes))


def _account(run: _Run, seconds: float, check: dict[str, Any] | None, *, resumed: bool) -> dict[str, Any]:
    """Tell what run.json keeps beside the manifest."""
    return {
        "source": run.source.spec,
        "images": run.plan.num_images,
        "texts": run.plan.num_texts,
        "invalid_images": run.invalid,
        "last_process": {
            "resumed": resumed,
            "seconds": round(seconds, 3),
            "images": run.images,
            "texts": run.texts,
            "images_per_second": round(run.images / seconds, 2),
        },
        "recall_check": check,
        "codecs": {name: {"codec": str(codec.chain), **codec.record} for name, codec in run.codecs.items()},
        "batch": run.config.batch,
        "batch_after_out_of_memory": run.fitting.sizes,
        "compile": run.config.compile,
        "channels_last": run.config.channels_last,
        "device": str(run.model.device),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"kdstore": __version__, "torch": torch.__version__, "open_clip": open_clip.__version__, "python": platform.python_version()},
    }


def feature_shapes(config: ExtractConfig, model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of a row of every array of features that a run computes, before any codec."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.parent is None:  # which has them
        shapes = {f"{side}/embedding": (model.embed_dim,) for side in ("image", "text")}
    if config.tokens in ("image", "both"):
        shapes["image/tokens"] = image_token_form(model, config.token_layer).shape
    if config.tokens in ("text", "both"):
        shapes["text/tokens"] = text_token_form(model, config.token_layer).shape
    return shapes


def planned_arrays(config: ExtractConfig, model: Model, plan: Plan) -> list[ArraySpec]:
    """List the arrays that a run writes: embeddings of both sides, tokens as asked, as their codecs leave them; raises ConfigError if one does not fit."""
    chains, arrays = chains_of(config), []
    for name, shape in feature_shapes(config, model).items():
        side: Side = "image" if name.startswith("image/") else "text"
        describe = embedding_array if name.endswith("/embedding") else token_array
        arrays.append(describe(plan, side, *chains[name].shapes(shape)[-1], dtype=chains[name].dtype, zstd=config.zstd))
    return [*arrays, scalar_array(plan, "text/length", "int64")] if config.tokens in ("text", "both") else arrays


def store_identity(config: ExtractConfig, model: Model, plan: Plan, codecs: Mapping[str, Codec]) -> dict[str, Any]:
    """Build what the features depend on: teacher, preprocessing, tokenizer, how images are decoded, source, and how each array is encoded."""
    encoding = {"norm": "none", "precision": config.precision, "views": ["plain"]}
    arrays: dict[str, dict[str, Any]] = {}
    if config.parent is None:
        arrays = {f"{side}/embedding": {**encoding, "layer": "output"} for side in ("image", "text")}
    for side, form_of in (("image", image_token_form), ("text", text_token_form)):
        if config.tokens in (side, "both"):
            arrays[f"{side}/tokens"] = {**encoding, **form_of(model, config.token_layer).encoding}
    for name, codec in codecs.items():
        arrays[name]["codec"] = codec_identity(codec)
    return {**model.identity, "decoding": DECODING, "source": {"fingerprint": plan.fingerprint}, "arrays": arrays}


def _write_images(run: _Run, attempt: Attempt, unit: Unit) -> None:
    names = [name for name in run.specs if name.startswith("image/")]
    started, before, reasons = time.perf_counter(), run.images, ["in an earlier unit"]
    for decoded in _batches_ahead(run, unit):
        pixels = [d for d, _ in decoded if d is not None]
        rows = [info for _, info in decoded]
        features = image_features(run.config, run.model, run.fitting, torch.stack(pixels)) if pixels else {}
        valid = np.array([info["valid"] for info in rows], bool)
        for name in names:
            attempt.append(name, _block(run, name, features.get(name), valid))
        attempt.index(rows)
        run.images += len(rows)
        run.invalid += int((~valid).sum())
        reasons = [info["reason"] for info in rows if not info["valid"]] or reasons
        _refuse_bad_data(run, reasons)
        rate = (run.images - before) / (time.perf_counter() - started)
        run.on_progress("images", run.images, run.totals["image"], f"{rate:.0f} images/s" + (f", {run.invalid} invalid" if run.invalid else ""))


def _refuse_bad_data(run: _Run, reasons: list[str]) -> None:
    """Raise SourceError when too many images are undecodable: of 100 or more so far, of all at the end, or every one."""
    seen = run.earlier_images + run.images
    ended = seen == run.plan.num_images
    if run.invalid > run.config.max_invalid * (seen if ended else max(seen, 100)) or (ended and run.invalid == seen):
        found = f"{run.invalid} of the first {seen} images cannot be decoded (the last: {reasons[-1]})."
        raise SourceError(found, "Check the data, or allow more with --set max_invalid=SHARE.")


def _write_texts(run: _Run, attempt: Attempt, unit: Unit) -> None:
    """Encode the captions of a unit, equal ones once for the embeddings."""
    batch, texts = 4 * run.config.batch, run.plan.texts(unit.start, unit.stop)
    valid = np.ones(len(texts), bool)
    if "text/embedding" in run.specs:
        embedding_MD = in_batches(lambda part: run.fitting.run("text", lambda some: (encode_text(run.model, some),), part)[0], texts, batch)
        attempt.append("text/embedding", _block(run, "text/embedding", embedding_MD.numpy(), valid))
    if "text/tokens" in run.specs:
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            hidden_BLW, length_B = run.fitting.run("text", lambda some: encode_text_tokens(run.model, some, run.config.token_layer), part)
            length_B = length_B.cpu()
            block = _block(run, "text/tokens", hidden_BLW.cpu().numpy(), valid[: len(hidden_BLW)])
            block[np.arange(block.shape[1]) >= length_B.numpy()[:, None]] = 0  # code 0, whatever it decodes to
            attempt.append("text/tokens", block)
            attempt.append("text/length", length_B.numpy())
    run.texts += len(texts)
    run.on_progress("texts", run.texts, run.totals["text"], "")


def _batches_ahead(run: _Run, unit: Unit) -> Iterator[list[_Decoded]]:
    """Decode the unit's batches in threads, two batches ahead of the model."""
    waiting: deque[list[Future[_Decoded]]] = deque()
    for start in range(unit.start, unit.stop, run.config.batch):
        rows = range(start, min(start + run.config.batch, unit.stop))
        waiting.append([run.pool.submit(_decode, run.source, run.model, i) for i in rows])
        if len(waiting) > 2:
            yield [f.result() for f in waiting.popleft()]
    while waiting:
        yield [f.result() for f in waiting.popleft()]


_Decoded = tuple[torch.Tensor | None, dict[str, Any]]
"""Pixels (None where undecodable) and what the index says of the image."""


def _decode(source: Source, model: Model, row: int) -> _Decoded:
    """Decode and preprocess one image; an undecodable one is a row with its reason."""
    try:
        loaded = source.image(row)
    except UndecodableImage as e:
        return None, {"sha256": e.sha256, "valid": 0, "reason": e.reason, "width": 0, "height": 0}
    info = {"sha256": loaded.sha256, "valid": 1, "reason": "", "width": loaded.width, "height": loaded.height}
    try:
        return model.preprocess(loaded.image), info
    except Exception as e:  # what torchvision and Pillow raise for an image that they cannot resize
        return None, {**info, "valid": 0, "reason": reason_of(e)}


def _block(run: _Run, name: str, features: npt.NDArray[np.float32] | None, valid: np.ndarray) -> np.ndarray:
    """Lay the features of valid rows, as they are stored, out among rows of NaN or code 0; raises ModelError for values that cannot be stored."""
    spec = run.specs[name]
    block = np.full((len(valid), *spec.shape[1:]), spec.fill, spec.dtype)
    if features is not None:
        block[valid] = encoded(name, features, run.codecs.get(name), spec.dtype).reshape(-1, *spec.shape[1:])
    return block


def _codecs(out: Path, config: ExtractConfig, source: Source, plan: Plan, model: Model, fitting: Fitting, on_progress: OnProgress) -> dict[str, Codec]:
    """Return the fitted codecs of a run: those of an earlier process, or new ones."""
    chains, shapes = chains_of(config), feature_shapes(config, model)
    kept = kept_codecs(out, chains, shapes)
    if kept is not None:
        return kept
    batches = sampled(config, plan, model, fitting, lambda row: _decode(source, model, row)[0], on_progress)
    return fit_codecs(chains, shapes, batches, min(config.codec_sample, plan.num_images), model.logit_scale)


def _check_space(out: Path, plan: Plan, arrays: Sequence[ArraySpec]) -> None:
    """Refuse before the first byte what cannot fit."""
    needed = sum(spec.row_bytes * plan.rows(spec.side) for spec in arrays)
    present = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(present).free
    have = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.is_dir() else 0
    if needed - have > free:
        raise DiskFull(
            f"{out} needs {needed / 1e9:.1f} GB for {plan.num_images} images and {plan.num_texts} texts; {free / 1e9:.1f} GB are free.",
            "Choose another disk with --out, fewer rows, or --tokens none.",
        )


def _check_teacher(model: Model, source: Source, batch: int, fitting: Fitting) -> dict[str, Any] | None:
    """Measure recall@1 on the first pairs: a teacher at chance is the wrong checkpoint, tokenizer or activation."""
    pictures, texts = [], []
    for i in range(min(4 * CHECKED_PAIRS, len(source))):
        captions = source.captions(i)
        if captions and captions[0].text not in texts:
            pixels, _ = _decode(source, model, i)
            if pixels is not None:
                pictures.append(pixels)
                texts.append(captions[0].text)
        if len(pictures) == CHECKED_PAIRS:
            break
    if len(pictures) < 16:
        return None
    parts = [torch.stack(pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
    image_ND = torch.cat([fitting.run("image", lambda some: (encode_image(model, some),), part)[0] for part in parts])
    text_ND = in_batches(lambda part: fitting.run("text", lambda some: (encode_text(model, some),), part)[0], texts, batch)
    found = retrieval_recall(image_ND.cpu().numpy(), text_ND.numpy(), np.arange(len(texts)), ks=(1, 5))
    recall, chance = found["image_retrieval_recall@5"], 100 * 5 / len(texts)
    warning = ""
    if recall < 2.5 * chance:
        warning = (
            f"Sanity check: in {recall:.0f} % of {len(texts)} pairs {model.name.name} has a caption's image in the top 5 (chance is {chance:.0f} %). "
            "Check the weights, or that the captions are of its kind."
        )
    return {"pairs": len(texts), "image_retrieval_recall@5": round(recall, 2), "chance": round(chance, 2), "warning": warning}
