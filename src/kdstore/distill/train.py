"""Distilling a student: from the settings to a run folder that open_clip loads.

One process, or several that torchrun started, of which the first alone touches the run folder. A teacher's embeddings come from a store (`online` runs it
instead, tests give anything that is `Targets`), gathered by the threads that also prepare the views, so that a step costs what it costs without one. The
settings alone decide a run: stopped and resumed, it gives the same bits on the same machine.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdstore
from kdstore.config import as_dict
from kdstore.data.source import Source
from kdstore.data.sources import open_source
from kdstore.distill.batches import BatchPlan, Maker
from kdstore.distill.building import Student, build_student, whole_student
from kdstore.distill.config import MACHINE, DistillConfig
from kdstore.distill.distributed import Share, World, joined, synchronised
from kdstore.distill.fitting import fit_student
from kdstore.distill.imported import check_imported
from kdstore.distill.loop import Training, train
from kdstore.distill.losses import EMBEDDINGS, needs_of, parse_loss, parts_of, terms_of
from kdstore.distill.objective import Objective, Teacher
from kdstore.distill.online import OnlineTargets, online_targets
from kdstore.distill.optimiser import choose_precision
from kdstore.distill.order import Announcer, check_cache, shuffle_of, windows_of
from kdstore.distill.pairs import INVALID, Pairs, pairs_of_source, pairs_of_stores, sides_of
from kdstore.distill.permuted import permute_targets
from kdstore.distill.runfolder import AVERAGE, RUN, begin_run, load_checkpoint, read_checkpoint, run_state
from kdstore.distill.targets import StoreTargets, Targets, check_views, open_stores, views_to_show
from kdstore.distill.teachers import check_loss, describe_teachers, match_temperatures
from kdstore.distill.validation import make_validation
from kdstore.distill.views import Views
from kdstore.errors import ConfigError, RunError
from kdstore.jsonfile import digest_of, read_json, write_json
from kdstore.models.checkpoint import export_model
from kdstore.models.load import DTYPES, Model, parameter_counts
from kdstore.models.names import local_config
from kdstore.models.pixels import Kept, split_preprocess
from kdstore.progress import OnProgress, silent
from kdstore.store import Cache, Store, fingerprint_of


@dataclass(frozen=True)
class DistillResult:
    """A finished run: its folder, what it took, and the numbers of its last step (`losses`: loss, each term, grad_norm, logit_scale)."""

    path: Path
    steps: int
    samples: int
    seconds: float
    samples_per_second: float
    waiting: float  # share of the time in which a step waited for data
    losses: dict[str, float]
    pairs: int  # that were trained on
    left_out: dict[str, int]  # reason -> images of the store or of the source
    skipped: int = 0  # steps whose loss or gradient was not finite
    already_done: bool = False


def distill(
    config: DistillConfig, *, source: Source | None = None, targets: Targets | Sequence[Targets] = (), on_progress: OnProgress = silent
) -> DistillResult:
    """Train a student as `config` says and leave it in its run folder; every process that torchrun started calls this alike.

    `source` replaces the one that `data` names; `targets` replace the stores' features, their rows numbered as the source's. A finished run of the same
    settings is left as it is and its result returned. Ctrl-C and SIGTERM let the step end and save a checkpoint.

    Raises ConfigError, MissingFeature, JoinError, SourceError and RunError before the first step; RunError for losses that are not finite;
    Interrupted for Ctrl-C and SIGTERM, with the way to go on. What one process raises, all of them raise.
    """
    live = tuple(targets) if isinstance(targets, Sequence) else (targets,)
    with joined(config.device) as (world, device):
        return _distill(config, world, device, source, live, on_progress if world.first else silent)


def _distill(
    config: DistillConfig, world: World, device: torch.device, source: Source | None, live: tuple[Targets, ...], on_progress: OnProgress
) -> DistillResult:
    path = config.run_path
    with world.together():
        check_loss(config)
        needs = needs_of(parse_loss(config.loss))
        if config.text_tower == "frozen":
            needs = tuple(dict.fromkeys((*needs, *EMBEDDINGS)))
        if needs and not config.caches and not config.teacher and not live:
            raise ConfigError(
                f"The loss '{config.loss}' needs a teacher's {', '.join(needs)}, but there is no store.",
                "Give --cache STORE or --teacher MODEL, or --loss none.",
            )
        cache = Cache.default(config.cache_folder, config.cache_gib)
        stores = open_stores(config.caches, cache)
        check_imported(config, stores, needs)
        stored = views_to_show(config.views, stores, needs)
        shown: tuple[Views, ...] = stored
        taught: tuple[Targets, ...] = live or tuple(StoreTargets(store, needs) for store in stores) if needs else ()
        online = None
        if config.teacher:
            source = source or _open_source(config, stores)
            online = online_targets(config, source, on_progress)
            taught, shown = (online,) if needs else (), (online.views,) if online.views else ()
        teachers = describe_teachers(config, taught)
        source = source or _open_source(config, stores)
        read = [name for name in needs if "/" in name] + ["image/view"] * bool(stored)
        shuffle = shuffle_of(config, stores, read if taught else (), cache)
        views = "stored" if stores and shown else "plain"
        settings = _settings(config, stores, source, online, live, choose_precision(config.precision, device), views, shuffle)
    _check_alike(world, settings)
    state = world.from_first(lambda: run_state(path, settings, resume=config.resume))
    if state == "finished":
        return world.from_first(lambda: _finished(path, on_progress))

    with world.together():
        pairs = _pairs(config, stores, source, needs, len(taught), on_progress)
        check_views(stored, pairs)
        if config.permute_targets is not None:
            taught = permute_targets(taught, pairs, config.permute_targets)
        share = Share.of(config.batch_size, world, config.micro_batch)
        plan = BatchPlan(len(pairs), config.batch_size, config.seed, share, *windows_of(shuffle, stores, read))
        fetched = check_cache(plan, pairs, stores, read, cache, permuted=config.permute_targets is not None)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with world.together():
            student = build_student(config, stores[0] if stores else None, device)
            model = student.model
            keep, finish = split_preprocess(model.preprocess)
            kept = Kept(0 if config.augment == "random" else int(config.memory_gib * 2**30))  # what is drawn anew comes once
            tokenizer = None if config.text_tower == "frozen" else model.tokenizer
            announce = Announcer(plan, pairs, stores, read) if fetched else None
            make = Maker(plan, pairs, source, taught, needs, keep, tokenizer, kept, shown, pin=device.type == "cuda", announce=announce)
        teachers = match_temperatures(config, teachers, make, world)
        with world.together():
            training = _start(config, model, teachers, plan, share, finish, DTYPES[settings["precision"]])
            validate = make_validation(config, stores, source, pairs, keep, tokenizer, on_progress)
            if state == "new" and world.first:
                begin_run(path, settings)
        if state == "unfinished" or world.size > 1:  # every process starts from the first one's weights, to the bit
            content = world.from_first(lambda: read_checkpoint(path) if state == "unfinished" else training.checkpoint(digest_of(settings)))
            training.restore(load_checkpoint(content, path, settings, device))
        train(training, make, path, digest_of(settings), on_progress, validate, announce.stop if announce else None)
        with world.together():
            result = _result(path, pairs, training)
            if world.first:
                student = _export(path, student, training, stores[0] if stores else None)
                write_json(path / RUN, _provenance(settings, stores, online, source, pairs, plan, student, training, result))
    return result


def _check_alike(world: World, settings: dict[str, Any]) -> None:
    """Raise RunError on all processes if one of them would do another run than the first: other data on its host, or other settings."""
    first = world.from_first(lambda: settings)
    differing = [name for name in settings if settings[name] != first.get(name)]
    with world.together():
        if differing:
            name = differing[0]
            found = f"{name} is {first.get(name)!r} on the first process and {settings[name]!r} on process {world.rank}"
            raise RunError(f"The processes of this run do not agree: {found}.", "Give every host the same command and the same data.")


def _open_source(config: DistillConfig, stores: Sequence[Store]) -> Source:
    if config.data is not None:
        return open_source(config.data)
    if not stores:
        raise ConfigError("Without a store nothing says where the images are.", "Give --data SOURCE.")
    return open_source(stores[0].recorded_source)


def _pairs(config: DistillConfig, stores: Sequence[Store], source: Source, needs: Sequence[str], num_teachers: int, on_progress: OnProgress) -> Pairs:
    """Find the pairs to train on and say which are not, or not for all teachers."""
    loss = parse_loss(config.loss)
    both_kinds = "synthetic captions" in parts_of(loss)
    sides = sides_of(needs)
    whole = sides if config.text_tower == "frozen" or any(term.joint for term in terms_of(loss).values()) else ()
    if stores:
        by_content = config.join == "content"
        pairs = pairs_of_stores(stores, source, needs=needs, both_kinds=both_kinds, whole=whole, by_content=by_content, on_progress=on_progress)
    else:
        pairs = pairs_of_source(source, num_teachers, both_kinds=both_kinds)
    if config.changed_images == "allow":
        pairs = dataclasses.replace(pairs, sha256=())
    if pairs.left_out.keys() - {INVALID}:
        on_progress("warning", 0, 0, f"trains on {len(pairs)} pairs; left out: {', '.join(f'{n} {reason}' for reason, n in pairs.left_out.items())}")
    for k, store in enumerate(stores):
        if lacking := pairs.lacking(k, sides):
            of = {"images": len(pairs), "captions": sum(len(texts.ids) for texts in pairs.all_texts)}
            said = " and ".join(f"{count} of {of[what]} {what}" for what, count in lacking.items())
            on_progress("warning", 0, 0, f"{store.path} lacks {said}; they are no rows of this teacher's terms")
    if both_kinds and pairs.synthetic is None:
        on_progress("warning", 0, 0, "all captions are of one kind, so the loss takes one of them instead of a real and a synthetic one")
    return pairs


def _settings(
    config: DistillConfig,
    stores: Sequence[Store],
    source: Source,
    online: OnlineTargets | None,
    live: Sequence[Targets],
    precision: str,
    views: str,
    shuffle: str,
) -> dict[str, Any]:
    """All that decides the result of a run, so that a run folder is continued by the same run only."""
    chosen = {name: value for name, value in as_dict(config).items() if name not in (*MACHINE, "shuffle")} | ({} if shuffle == "full" else {"shuffle": shuffle})
    features = [digest for store in stores for digest in store.digests] or [type(targets).__name__ for targets in live]
    if online is not None:
        features = [digest_of(online.identity)]
    fingerprint = fingerprint_of((source.key(i), source.captions(i)) for i in range(len(source)))
    if (architecture := local_config(config.student)) is not None:
        chosen["student_config"] = digest_of(architecture)
    return {**chosen, "precision": precision, "views": views, "stores": features, "source": fingerprint, "source_pairs": len(source)}


def _finished(path: Path, on_progress: OnProgress) -> DistillResult:
    run = read_json(path / RUN, RunError)
    found, pairs = run["result"], run["pairs"]
    on_progress("distill", found["steps"], found["steps"], f"{path} is finished already")
    return DistillResult(path=path, pairs=pairs["used"], left_out=pairs["left_out"], already_done=True, **found)


def _start(
    config: DistillConfig, model: Model, teachers: Sequence[Teacher], plan: BatchPlan, share: Share, finish: Callable[[Tensor], Tensor], precision: torch.dtype
) -> Training:
    width = fit_student(model, parts_of(parse_loss(config.loss)))
    objective = Objective(config.loss, teachers, student_dim=model.embed_dim, token_width=width, projector=config.projector, seed=config.seed)
    steps = config.samples // config.batch_size if config.samples else (config.epochs or 32) * plan.steps_per_epoch
    model.clip = synchronised(model.clip.train(), share.world, model.device)
    if config.grad_checkpointing:
        model.clip.set_grad_checkpointing(True)
    return Training(config, steps, model.clip, objective.to(model.device), finish, model.device, precision, share)


def _export(path: Path, student: Student, t: Training, store: Store | None) -> Student:
    """Write the trained student, and beside it the average of its weights; returns the student as one model of open_clip."""
    if t.average is not None:
        averaged = whole_student(dataclasses.replace(student, model=dataclasses.replace(student.model, clip=t.average.student)), t.config, store).model
        export_model(path / AVERAGE, averaged.clip.eval(), averaged.config, averaged.tokenizer)
    student = whole_student(student, t.config, store)
    export_model(path, student.model.clip.eval(), student.model.config, student.model.tokenizer)
    return student


def _result(path: Path, pairs: Pairs, t: Training) -> DistillResult:
    samples = t.steps * t.config.batch_size
    return DistillResult(path, t.steps, samples, t.seconds, samples / t.seconds, t.waited / t.seconds, t.latest, len(pairs), pairs.left_out, t.skipped)


def _provenance(
    settings: dict[str, Any],
    stores: Sequence[Store],
    online: OnlineTargets | None,
    source: Source,
    pairs: Pairs,
    plan: BatchPlan,
    student: Student,
    t: Training,
    result: DistillResult,
) -> dict[str, Any]:
    """What run.json says: where the student comes from and what making it took."""
    model = student.model
    return {
        "stage": "distill",
        "settings": settings,
        "settings_digest": digest_of(settings),
        "config": as_dict(t.config),
        "stores": [{"path": store.place, "digests": store.digests, "identity": store.identity} for store in stores],
        "online": None if online is None else online.identity,
        "source": source.spec,
        "pairs": {
            "used": len(pairs),
            "left_out": pairs.left_out,
            "lacking": {store.place: lacking for k, store in enumerate(stores) if (lacking := pairs.lacking(k))},
            "dropped_per_epoch": plan.dropped,
            "epochs": t.steps / plan.steps_per_epoch,
        },
        "order": {"block": plan.block, "window": plan.window} if plan.windowed else "full",
        "loss": {"terms": t.objective.weights, "teachers": t.objective.account()},
        "student": {"name": model.name.name, "config": model.config, "parameters": parameter_counts(model.clip), "started_from": student.started_from},
        "ema": None if t.average is None else {"decay": t.average.decay, "student": AVERAGE},
        "validation": t.validation,
        "result": {name: value for name, value in as_dict(result).items() if name not in ("path", "pairs", "left_out", "already_done")},
        "machine": {
            "device": str(t.device),
            "processes": t.share.world.size,
            "pairs_at_once": t.share.piece,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "kdstore": kdstore.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow")},
        },
    }
