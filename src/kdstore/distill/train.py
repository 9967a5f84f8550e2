"""Distilling a student: from the settings to a run folder that open_clip loads.

One process and one device. The teacher is never here: its embeddings come from a store (in tests from anything that is `Targets`), gathered by the threads
that also prepare the views, so that a step costs what it costs without a teacher. The settings alone decide a run: stopped and resumed, it gives the same
bits on the same machine.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kdstore
from kdstore.config import as_dict
from kdstore.data.source import Source
from kdstore.data.sources import open_source
from kdstore.distill.batches import BatchPlan, Maker
from kdstore.distill.building import Student, build_student, whole_student
from kdstore.distill.config import MACHINE, DistillConfig
from kdstore.distill.loop import Training, train
from kdstore.distill.losses import EMBEDDINGS, feature_weight, needs_of, parse_loss
from kdstore.distill.objective import Objective
from kdstore.distill.optimiser import choose_precision
from kdstore.distill.pairs import INVALID, Pairs, pairs_of_source, pairs_of_store
from kdstore.distill.runfolder import RUN, begin_run, export_student, load_checkpoint, run_state
from kdstore.distill.targets import StoreTargets, Targets, views_to_show
from kdstore.distill.views import Kept, split_preprocess
from kdstore.errors import ConfigError, RunError
from kdstore.jsonfile import digest_of, read_json, write_json
from kdstore.models.load import DTYPES, Model, parameter_counts, pick_device
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
    already_done: bool = False


def distill(config: DistillConfig, *, source: Source | None = None, targets: Targets | None = None, on_progress: OnProgress = silent) -> DistillResult:
    """Train a student as `config` says and leave it in its run folder.

    `source` replaces the one that `data` names; `targets` replace the store's features, their rows numbered as the source's. A finished run of the same
    settings is left as it is and its result returned. Ctrl-C lets the step end and saves a checkpoint.

    Raises ConfigError, MissingFeature, JoinError, SourceError and RunError before the first step; RunError for a loss that is not finite;
    Interrupted for Ctrl-C, with the way to go on.
    """
    needs = needs_of(parse_loss(config.loss))
    if config.text_tower == "frozen":
        needs = tuple(dict.fromkeys((*needs, *EMBEDDINGS)))
    if needs and config.cache is None and targets is None:
        raise ConfigError(f"The loss '{config.loss}' needs a teacher's {', '.join(needs)}, but there is no store.", "Give --cache STORE, or --loss none.")
    store = None if config.cache is None else open_store(config.cache)
    if store is not None and targets is None and needs:
        targets = StoreTargets(store, needs)
    source = source or _open_source(config, store)
    device = pick_device(config.device)
    stored = views_to_show(config.views, store, needs)
    settings = _settings(config, store, source, targets, choose_precision(config.precision, device), "plain" if stored is None else "stored")
    state = run_state(config.run_path, settings, resume=config.resume)
    if state == "finished":
        return _finished(config.run_path, on_progress)

    pairs = pairs_of_source(source) if store is None else pairs_of_store(store, source)
    if config.changed_images == "allow":
        pairs = dataclasses.replace(pairs, sha256=None)
    plan = BatchPlan(len(pairs), config.batch_size, config.seed)
    if pairs.left_out.keys() - {INVALID}:
        on_progress("warning", 0, 0, f"trains on {len(pairs)} pairs; left out: {', '.join(f'{n} {reason}' for reason, n in pairs.left_out.items())}")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        student = build_student(config, store, device)
        model = student.model
        keep, finish = split_preprocess(model.preprocess)
        training = _start(config, model, targets if needs else None, plan, finish, DTYPES[settings["precision"]])
        if state == "unfinished":
            training.restore(load_checkpoint(config.run_path, settings, device))
        else:
            begin_run(config.run_path, settings)
        kept = Kept(int(config.memory_gib * 2**30))
        tokenizer = None if config.text_tower == "frozen" else model.tokenizer
        make = Maker(plan, pairs, source, targets if needs else None, keep, tokenizer, kept, stored, pin=device.type == "cuda")
        train(training, make, config.run_path, digest_of(settings), on_progress)
        student = whole_student(student, config, store)
    export_student(config.run_path, student.model.clip.eval(), student.model.config, student.model.tokenizer)
    result = _result(config.run_path, pairs, training)
    write_json(config.run_path / RUN, _provenance(settings, store, source, pairs, plan, student, training, result))
    return result


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
    return {**chosen, "precision": precision, "views": views, "store": features, "source": fingerprint, "source_pairs": len(source)}


def _finished(path: Path, on_progress: OnProgress) -> DistillResult:
    run = read_json(path / RUN, RunError)
    found, pairs = run["result"], run["pairs"]
    on_progress("distill", found["steps"], found["steps"], f"{path} is finished already")
    return DistillResult(path=path, pairs=pairs["used"], left_out=pairs["left_out"], already_done=True, **found)


def _start(config: DistillConfig, model: Model, targets: Targets | None, plan: BatchPlan, finish: Any, precision: torch.dtype) -> Training:
    objective = Objective(
        config.loss,
        student_dim=model.embed_dim,
        teacher_dim=None if targets is None else targets.dim,
        teacher_scale=None if targets is None else targets.logit_scale,
        projector=config.projector,
        seed=config.seed,
    ).to(model.device)
    steps = config.samples // config.batch_size if config.samples else (config.epochs or 32) * plan.steps_per_epoch
    model.clip.train()
    torch.manual_seed(config.seed)  # dropout of the student does not depend on how much its initialisation drew
    return Training(config, steps, model.clip, objective, finish, model.device, precision)


def _result(path: Path, pairs: Pairs, t: Training) -> DistillResult:
    samples = t.steps * t.config.batch_size
    return DistillResult(path, t.steps, samples, t.seconds, samples / t.seconds, t.waited / t.seconds, t.latest, len(pairs), pairs.left_out)


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
        "result": {name: value for name, value in as_dict(result).items() if name not in ("path", "pairs", "left_out", "already_done")},
        "machine": {"device": str(t.device), "platform": platform.platform(), "threads": torch.get_num_threads()},
        "versions": {
            "kdstore": kdstore.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow")},
        },
    }
