"""What a run is to compute, worked out from its settings before any unit: the same in the process that commits, in every worker and in every part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.data.folder import PREFIX as IMAGES_ALONE
from kdstore.data.images import DECODING
from kdstore.data.source import Source
from kdstore.data.sources import open_source
from kdstore.errors import ConfigError, DiskFull, IdentityMismatch, SourceError
from kdstore.extract.arrays import feature_shapes, planned_arrays, store_identity
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import chains_of, fit_codecs, kept_codecs, sampled
from kdstore.extract.parent import RowsOfStore
from kdstore.extract.units import Extractor
from kdstore.extract.views import sampled_views
from kdstore.models.load import load_model
from kdstore.models.memory import Fitting
from kdstore.models.names import resolve
from kdstore.progress import OnProgress, silent
from kdstore.store import ArraySpec, Begun, Codec, Plan, StoreWriter, check_place, child_identity, codec_files, open_store, plan_child, read_keys

COMPARED = 256  # rows of a source with those of a plan
LONG_RUN = 512  # images from which a look at the teacher is worth its time


@dataclass(frozen=True, eq=False)
class Job:
    """A store to be written, and the teacher ready to write it."""

    config: ExtractConfig
    out: Path
    source: Source
    plan: Plan
    arrays: tuple[ArraySpec, ...]
    codecs: dict[str, Codec]
    identity: dict[str, Any]
    extractor: Extractor

    @property
    def worth_a_check(self) -> bool:
        """Whether the run is long, and the teacher not the one of a store that was checked before."""
        return self.config.parent is None and self.plan.num_images >= LONG_RUN

    def open_writer(self, on_progress: OnProgress = silent) -> StoreWriter:
        """Become the store's committer, or find it complete; raises IdentityMismatch, StoreLocked, DamagedStore, DiskFull, CannotWrite."""
        constants = {path: content for name, codec in self.codecs.items() for path, content in codec_files(name, codec).items()}
        return StoreWriter.open(self.out, plan=self.plan, arrays=self.arrays, identity=self.identity, constants=constants, on_progress=on_progress)


def store_path(config: ExtractConfig) -> Path:
    """Return where the store of a run lies."""
    return Path(config.out or f"store/{resolve(config.teacher, config.pretrained, untrained=config.untrained_seed is not None).short}")


def prepare(
    config: ExtractConfig,
    say: Callable[[str], None],
    on_progress: OnProgress = silent,
    *,
    source: Source | None = None,
    begun: Begun | None = None,
    fit: bool = True,
) -> Job:
    """Open source and teacher, freeze the plan and fit the codecs, or take those that a run has left; `say` is told what a user should know.

    `begun` is what the store's build folder says, for those who join a run: the plan is taken from it, looked at in some rows, and its identity must be what is
    worked out here. Without
    `fit` no codec is fitted and no space asked for: good for a look only. Raises ModelError, SourceError, JoinError, ConfigError, IdentityMismatch, DiskFull.
    """
    check_place(store_path(config))  # what can be wrong without a look at data or teacher comes before either
    parent = open_store(config.parent) if config.parent else None
    planned = plan_child(parent, read_keys(config.keys) if config.keys else None, config.unit_rows) if parent else None
    source = source or open_source(config.data or (parent.recorded_source if parent else "scenes"), on_progress=on_progress)
    seed = config.untrained_seed
    name = resolve(config.teacher, config.pretrained, untrained=seed is not None)
    for notice in [*source.notices, *([name.notice] if name.notice else [])]:
        say(notice)  # before the weights are fetched
    on_progress("load", 0, 1, config.teacher)
    options: dict[str, Any] = {"device": config.device, "precision": config.precision, "compile": config.compile, "channels_last": config.channels_last}
    model = load_model(config.teacher, config.pretrained, untrained=seed is not None, seed=seed or 0, **options)
    on_progress("load", 1, 1, config.teacher)
    on_progress("plan", 0, len(source), source.spec)
    if parent is not None and planned is not None:
        child_identity(parent, {**model.identity, "decoding": DECODING})  # before anything is computed
        wider = {"image/embedding"} if config.views and "image/view" not in parent.arrays else set()
        if held := sorted(feature_shapes(config, model).keys() & parent.arrays.keys() - wider):
            raise ConfigError(f"{parent.path} holds {' and '.join(held)} already.", "Ask for other --tokens, or make a store without --parent.")
        rows, plan = planned
        source = of_parent = RowsOfStore(parent, rows, plan, source)
        if config.reads_images:
            of_parent.find()
    elif begun is not None:
        plan = begun.plan
        _compare_rows(source, plan)
    else:
        source_rows = ((source.key(i), source.captions(i)) for i in range(len(source)))
        plan = Plan.freeze(source_rows, unit_rows=config.unit_rows, folder=present_folder(store_path(config)))
    needs_texts = config.tokens in ("text", "both") or not (parent or source.spec.startswith(IMAGES_ALONE))
    if plan.num_texts == 0 and needs_texts:
        raise SourceError(f"{source.spec} has no caption.", "Name the caption column, or give other data.")
    on_progress("plan", len(source), len(source), source.spec)
    arrays, out = tuple(planned_arrays(config, model, plan)), store_path(config)
    if fit:
        _check_space(out, plan, arrays)
    fitting, chains, shapes = Fitting(say), chains_of(config), feature_shapes(config, model)
    codecs = kept_codecs(out, chains, shapes) if fit else {}
    if codecs is None:
        bare = Extractor(config, source, plan, model, arrays, {}, fitting)
        batches = sampled(config, plan, model, fitting, lambda row: bare.decode(row, sampled_views(config, row))[0], on_progress)
        at_most = min(config.codec_sample, plan.num_images)
        codecs = fit_codecs(chains, shapes, batches, at_most, model.logit_scale, refuse=config.bad_values == "refuse")
        bare.close()
    identity = store_identity(config, model, plan, codecs)
    if parent is not None:
        identity = child_identity(parent, identity)
    if begun is not None and identity != begun.identity:
        raise IdentityMismatch(f"What this process would compute is not what {out} is to hold.", "Give it the same weights, data and versions as the others.")
    return Job(config, out, source, plan, arrays, codecs, identity, Extractor(config, source, plan, model, arrays, codecs, fitting))


def _compare_rows(source: Source, plan: Plan) -> None:
    """Refuse a source that is not the one that was planned, as far as its length and some rows tell; raises IdentityMismatch."""
    rows = np.unique(np.linspace(0, plan.num_images - 1, COMPARED, dtype=np.int64)).tolist() if len(source) == plan.num_images else None
    if rows is None or any((source.key(i), source.captions(i)) != plan.row(i) for i in rows):
        raise IdentityMismatch(f"{source.spec} does not hold the {plan.num_images} rows that this store was begun with.", "Give it the data of the others.")


def needed_bytes(plan: Plan, arrays: Sequence[ArraySpec]) -> int:
    """Return the bytes of all arrays, without indices and metadata."""
    return sum(spec.row_bytes * spec.views * plan.rows(spec.side) for spec in arrays)


def present_folder(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _check_space(out: Path, plan: Plan, arrays: Sequence[ArraySpec]) -> None:
    """Refuse before the first byte what cannot fit."""
    needed, free = needed_bytes(plan, arrays), shutil.disk_usage(present_folder(out)).free
    have = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.is_dir() else 0
    if needed - have > free:
        raise DiskFull(
            f"{out} needs {needed / 1e9:.1f} GB for {plan.num_images} images and {plan.num_texts} texts; {free / 1e9:.1f} GB are free.",
            "Choose another disk with --out, fewer rows, or --tokens none.",
        )
