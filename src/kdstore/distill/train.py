"""Distilling a student: from the settings to a run folder that open_clip loads.

One process, or several that torchrun started, of which the first alone touches the run folder. The teacher is never here: its embeddings come from a store
(in tests from anything that is `Targets`), gathered by the threads that also prepare the views, so that a step costs what it costs without a teacher. The
settings alone decide a run: stopped and resumed, it gives the same bits on the same machine.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
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
from kdstore.distill.loop import Training, train
from kdstore.distill.losses import EMBEDDINGS, feature_weight, needs_of, parse_loss
from kdstore.distill.objective import Objective
from kdstore.distill.optimiser import choose_precision
from kdstore.distill.pairs import INVALID, Pairs, pairs_of_source, pairs_of_store
from kdstore.distill.runfolder import AVERAGE, RUN, begin_run, export_student, load_checkpoint, read_checkpoint, run_state
from kdstore.distill.targets import StoreTargets, Targets, views_to_show
from kdstore.distill.views import Kept, split_preprocess
from kdstore.errors import ConfigError, RunError
from kdstore.jsonfile import digest_of, read_json, write_json
from kdstore.models.load import DTYPES, Model, parameter_counts
from kdstore.models.names import local_config
from kdstore.progress import OnProgress, silent
from kdstore.store import Store, fingerprint_of, open_store


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


def distill(config: DistillConfig, *, source: Source | None = None, targets: Targets | None = None, on_progress: OnProgress = silent) -> DistillResult:
    """Train a student as `config` says and leave it in its run folder; every process that torchrun started calls this alike.

    `source` replaces the one that `data` names; `targets` replace the store's features, their rows numbered as the source's. A finished run of the same
    settings is left as it is and its result returned. Ctrl-C and SIGTERM let the step end and save a checkpoint.

    Raises ConfigError, MissingFeature, JoinError, SourceError and RunError before the first step; RunError for losses that are not finite;
    Interrupted for Ctrl-C and SIGTERM, with the way to go on. What one process raises, all of them raise.
    """
    with joined(config.device) as (world, device):
        return _distill(config, world, device, source, targets, on_progress if world.first else silent)


def _distill(
    config: DistillConfig, world: World, device: torch.device, source: Source | None, targets: Targets | None, on_progress: OnProgress
) -> DistillResult:
    path = config.run_path
    with world.together():
        needs = needs_of(parse_loss(config.loss))
        if config.text_tower == "frozen":
            needs = tuple(dict.fromkeys((*needs, *EMBEDDINGS)))
        if needs and config.cache is None and targets is None:
            raise ConfigError(f"The loss '{config.loss}' needs a teacher's {', '.join(needs)}, but there is no store.", "Give --cache STORE, or --loss none.")
        store = None if config.cache is None else open_store(config.cache)
        if store is not None and targets is None and needs:
            targets = StoreTargets(store, needs)
        source = source or _open_source(config, store)
        stored = views_to_show(config.views, store, needs)
        settings = _settings(config, store, source, targets, choose_precision(config.precision, device), "plain" if stored is None else "stored")
    _check_alike(world, settings)
    state = world.from_first(lambda: run_state(path, settings, resume=config.resume))
    if state == "finished":
        return world.from_first(lambda: _finished(path, on_progress))

    with world.together():
        pairs = pairs_of_source(source) if store is None else pairs_of_store(store, source)
        if config.changed_images == "allow":
            pairs = dataclasses.replace(pairs, sha256=None)
        share = Share.of(config.batch_size, world, config.micro_batch)
        plan = BatchPlan(len(pairs), config.batch_size, config.seed, share)
        if pairs.left_out.keys() - {INVALID}:
            on_progress("warning", 0, 0, f"trains on {len(pairs)} pairs; left out: {', '.join(f'{n} {reason}' for reason, n in pairs.left_out.items())}")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with world.together():
            student = build_student(config, store, device)
            model = student.model
            keep, finish = split_preprocess(model.preprocess)
            training = _start(config, model, targets if needs else None, plan, share, finish, DTYPES[settings["precision"]])
            if state == "new" and world.first:
                begin_run(path, settings)
        if state == "unfinished" or world.size > 1:  # every process starts from the first one's weights, to the bit
            content = world.from_first(lambda: read_checkpoint(path) if state == "unfinished" else training.checkpoint(digest_of(settings)))
            training.restore(load_checkpoint(content, path, settings, device))
        kept = Kept(int(config.memory_gib * 2**30))
        tokenizer = None if config.text_tower == "frozen" else model.tokenizer
        make = Maker(plan, pairs, source, targets if needs else None, keep, tokenizer, kept, stored, pin=device.type == "cuda")
        train(training, make, path, digest_of(settings), on_progress)
        with world.together():
            result = _result(path, pairs, training)
            if world.first:
                student = _export(path, student, training, store)
                write_json(path / RUN, _provenance(settings, store, source, pairs, plan, student, training, result))
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


def _open_source(config: DistillConfig, store: Store | None) -> Source:
    if config.data is not None:
        return open_source(config.data)
    if store is None:
        raise ConfigError("A student without a teacher needs images.", "Give --data SOURCE.")
    return open_source(store.recorded_source)


def _settings(config: DistillConfig, store: Store | None, source: Source, targets: Targets | None, precision: str, views: str) -> dict[str, Any]:
    """All that decides the result of a run, so that a run folder is continued by the same run only."""
    chosen = {name: value for name, value in as_dict(config).items() if name not in MACHINE}
    features = store.digest if store is not None else None if targets is None else type(targets).__name__
    fingerprint = fingerprint_of((source.key(i), source.captions(i)) for i in range(len(source)))
    if (architecture := local_config(config.student)) is not None:
        chosen["student_config"] = digest_of(architecture)
    return {**chosen, "precision": precision, "views": views, "store": features, "source": fingerprint, "source_pairs": len(source)}


def _finished(path: Path, on_progress: OnProgress) -> DistillResult:
    run = read_json(path / RUN, RunError)
    found, pairs = run["result"], run["pairs"]
    on_progress("distill", found["steps"], found["steps"], f"{path} is finished already")
    return DistillResult(path=path, pairs=pairs["used"], left_out=pairs["left_out"], already_done=True, **found)


def _start(
    config: DistillConfig, model: Model, targets: Targets | None, plan: BatchPlan, share: Share, finish: Callable[[Tensor], Tensor], precision: torch.dtype
) -> Training:
    objective = Objective(
        config.loss,
        student_dim=model.embed_dim,
        teacher_dim=None if targets is None else targets.dim,
        teacher_scale=None if targets is None else targets.logit_scale,
        projector=config.projector,
        seed=config.seed,
    ).to(model.device)
    steps = config.samples // config.batch_size if config.samples else (config.epochs or 32) * plan.steps_per_epoch
    model.clip = synchronised(model.clip.train(), share.world, model.device)
    if config.grad_checkpointing:
        model.clip.set_grad_checkpointing(True)
    return Training(config, steps, model.clip, objective, finish, model.device, precision, share)


def _export(path: Path, student: Student, t: Training, store: Store | None) -> Student:
    """Write the trained student, and beside it the average of its weights; returns the student as one model of open_clip."""
    if t.average is not None:
        averaged = whole_student(dataclasses.replace(student, model=dataclasses.replace(student.model, clip=t.average.student)), t.config, store).model
        export_student(path / AVERAGE, averaged.clip.eval(), averaged.config, averaged.tokenizer)
    student = whole_student(student, t.config, store)
    export_student(path, student.model.clip.eval(), student.model.config, student.model.tokenizer)
    return student


def _result(path: Path, pairs: Pairs, t: Training) -> DistillResult:
    samples = t.steps * t.config.batch_size
    return DistillResult(path, t.steps, samples, t.seconds, samples / t.seconds, t.waited / t.seconds, t.latest, len(pairs), pairs.left_out, t.skipped)


def _provenance(
    settings: dict[str, Any], store: Store | None, source: Source, pairs: Pairs, plan: BatchPlan, student: Student, t: Training, result: DistillResult
) -> dict[str, Any]:
    """What run.json says: where the student comes from and what making it took."""
    objective, projector, model = t.objective, t.objective.image_projector, student.model
    return {
        "stage": "distill",
        "settings": settings,
        "settings_digest": digest_of(settings),
        "config": as_dict(t.config),
        "store": None if store is None else {"path": str(store.path), "digest": store.digest, "identity": store.identity},
        "source": source.spec,
        "pairs": {"used": len(pairs), "left_out": pairs.left_out, "dropped_per_epoch": plan.dropped, "epochs": t.steps / plan.steps_per_epoch},
        "loss": {
            "terms": objective.weights,
            "weight_on_one_minus_cos": None if objective.teacher_dim is None else feature_weight(objective.weights, objective.teacher_dim),
            "projector": [projector.in_features, projector.out_features] if isinstance(projector, torch.nn.Linear) else None,
        },
        "student": {"name": model.name.name, "config": model.config, "parameters": parameter_counts(model.clip), "started_from": student.started_from},
        "ema": None if t.average is None else {"decay": t.average.decay, "student": AVERAGE},
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
